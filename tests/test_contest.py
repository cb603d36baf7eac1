"""Contestants of a benchmark run in turn, each in its own process. Mechanics only: nothing depends on time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import contest
from contest import Contestant, take_turns


def test_a_package_and_pytorch_take_turns(tiny_package: Path, tiny_checkpoint: Path) -> None:
    visits: list[int] = []
    contestants = [
        Contestant("melt", contest.package, tiny_package, 1, 2, 20, 1, 10),
        Contestant("eager bf16", contest.eager, tiny_checkpoint, "bf16", 1, 2, 20, 1),
    ]
    found = take_turns(contestants, 2, lambda: visits.append(1))
    assert len(visits) == 2 * 3  # two rounds, and one before that does not count
    assert [len(contestant.samples) for contestant in contestants] == [2, 2]
    assert found["melt"]["time_against_first"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert found["eager bf16"]["token_s"]["median"] > 0
    assert found["melt"]["prefill_s"]["median"] > 0
    assert found["eager bf16"]["peak_bytes"]["median"] > 0


def test_a_contestant_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"melt: PackageError: package .* does not exist"):
        take_turns([Contestant("melt", contest.package, tmp_path / "nowhere", 1, 1, 0, 1, 0)], 1, lambda: None)
