"""A short run of what ``make fuzz`` does for an hour: no input of a stranger is more than taken or refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from fuzz import mutations, targets
from fuzz.campaign import Finding, Tally, Worker, hunt

EXAMPLES = 300  # of a target: some seconds


@pytest.mark.parametrize("name", targets.TARGETS)
def test_every_input_is_taken_or_refused_in_one_sentence(name: str, tiny_package: Path) -> None:
    tally = Tally(name)
    with Worker(name, tiny_package) as worker:
        hunt(worker, tally, EXAMPLES, start=0)
    assert tally.findings == {}
    assert tally.outcomes["accepted"] > 0
    assert tally.tried > EXAMPLES // 2


def _dies() -> None:
    os.abort()


def _hangs() -> None:
    while True:
        pass


def _devours() -> None:
    bytearray(600 << 20)


def _exhausts() -> None:
    bytearray(1 << 50)


def _fails() -> None:
    raise KeyError("x")


def _refuses_in_two_lines() -> None:
    raise ValueError("a\nb")


FAULTS: dict[bytes, tuple[Callable[[], object], str]] = {
    b"dies": (_dies, "signal"),
    b"hangs": (_hangs, "hang"),
    b"devours": (_devours, "over-allocation"),
    b"exhausts": (_exhausts, "failed"),
    b"fails": (_fails, "failed"),
    b"refuses": (_refuses_in_two_lines, "unclear"),
}


class Faulty:
    """A target that does what its input names."""

    mutate: ClassVar[mutations.Mutate] = mutations.bytes_of
    refused = (ValueError,)

    def __init__(self, package: Path):
        """Nothing to do."""

    def seeds(self) -> list[bytes]:
        return [b"good"]

    def attempt(self, content: bytes) -> None:
        if content in FAULTS:
            FAULTS[content][0]()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_the_next_input_is_tried_all_the_same(
    fault: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "sitecustomize.py").write_text(
        "import fuzz.targets, test_fuzz\nfuzz.targets.TARGETS['faulty'] = test_fuzz.Faulty\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("fuzz.campaign.SECONDS", 3)
    with Worker("faulty", tmp_path / "package") as worker:
        assert worker.attempt(b"good") == "accepted"
        found = worker.attempt(fault)
        assert isinstance(found, Finding)
        assert found.what == FAULTS[fault][1]
        assert worker.attempt(b"good") == "accepted"
