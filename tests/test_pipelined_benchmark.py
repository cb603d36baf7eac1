"""A small version of the benchmark of pipelined decoding. Mechanics only: nothing depends on time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage, write_tokenizer
from melt_runtime import Runtime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import pipelined
import pipelined_adaptive
import pipelined_docs
import pipelined_tokens
from pipelined_speed import Turns, run_costs, speed
from pipelined_tokens import Difference

LOOPS = 4


def no_step(*_: object) -> None:
    """Show no progress."""


@pytest.fixture(scope="module")
def package(make_package: MakePackage, make_looplm: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoopLM that reads additions."""
    checkpoint = tmp_path_factory.mktemp("addition") / "checkpoint"
    checkpoint.mkdir()
    for file in make_looplm().iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    write_tokenizer(checkpoint, "0123456789+=")
    return make_package(checkpoint, max_seq_len=64, chunk=8, max_batch=2)


@pytest.fixture(scope="module")
def report(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every section, with packages that lie where the benchmark finds them."""
    directory = tmp_path_factory.mktemp("pipelined")
    settings = pipelined.Settings(
        **{**pipelined.QUICK, "identity_tokens": 15 * pipelined_tokens._ANSWER, "problems": 2, "rounds": 1}
    )
    (directory / "teacher").symlink_to(package)
    (directory / f"looplm-{settings.layers}-{settings.hidden}-int4").symlink_to(package)
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelined_tokens, "SHAPES", dict(list(pipelined_tokens.SHAPES.items())[:1]))
        for name in pipelined.SECTIONS:
            pipelined.run([name], settings, directory, no_step, found)
            found[name] = pipelined.about(settings) | found[name]
    return found


def test_identity_counts_tokens_of_every_kind_of_package(report: dict[str, Any]) -> None:
    rows = report["identity"]["results"]
    assert [row["kind"] for row in rows] == list(pipelined_tokens.KINDS)
    assert sum(row["tokens"] for row in rows) >= 15 * pipelined_tokens._ANSWER
    assert all(row["differences"] == [] and row["ties"] == 0 for row in rows)
    assert all(1 < row["runs_per_token"] <= 2 for row in rows)


def test_a_difference_is_a_tie_only_within_the_noise() -> None:
    row = np.array([1.0, 3.0, 2.9], np.float32)
    for noise, tie in ((0.01, False), (0.06, True)):
        found = pipelined_tokens._difference([(row, row), (row, row + np.float32(noise))], [0, 1, 1], [0, 1, 2])
        assert found.place == 2
        assert found.gap == pytest.approx(0.1, rel=1e-3)
        assert found.noise == pytest.approx(noise, rel=1e-3)
        assert found.tie is tie
    assert not Difference(0, float("inf"), 0.0).tie


def test_wrong_pipelined_tokens_are_counted(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Runtime.generate

    def spoiled(self: Runtime, prompt: Any, **options: Any) -> Any:
        found: Any = generate(self, prompt, **options)
        if options["pipeline"] == "on":
            *others, last = found.token_ids
            object.__setattr__(found, "token_ids", (*others, (last + 1) % self.manifest.vocab_size))
        return found

    monkeypatch.setattr(Runtime, "generate", spoiled)
    found = pipelined_tokens.compare(Runtime.load(package), 2, 6)
    assert [one["place"] for one in found["differences"]] == [5, 5]
    assert found["ties"] == 0


def test_the_trained_section_compares_drafts_of_every_loop_with_those_of_the_first(report: dict[str, Any]) -> None:
    section = report["trained"]
    ways = [(row["problems"], row["loops"], row["temperature"]) for row in section["results"]]
    assert ways == [("hard", 2, 0), ("hard", 3, 0), ("hard", 4, 0), ("hard", 4, 1), ("even", 4, 0)]
    for row in section["results"]:
        assert all(found["same"] == 2 for found in row["modes"].values())
        assert row["modes"]["plain"]["runs_per_token"] == row["loops"]
        every, first = row["modes"]["every loop"], row["modes"]["loop 1 alone"]
        assert 1 < every["runs_per_token"] <= row["loops"]
        assert 1 < first["runs_per_token"] <= row["loops"]
        assert not any(first["held"][1:])
        assert not any(first["dropped"][1:])
    assert all(len(pattern) == LOOPS - 1 for pattern in section["opinions"])
    assert sum(section["opinions"].values()) == 2 * 2 * 6  # of 8 tokens, the first and the last are not drafted


@pytest.mark.parametrize(("opinion", "runs"), [("111", 1), ("011", 2), ("001", 3), ("000", 4)])
def test_replayed_drafts_are_right_from_the_loop_that_knew(package: Path, opinion: str, runs: int) -> None:
    count = 20
    turns = Turns(Runtime.load(package).driver(), 5, count, {opinion: 7})
    turns.plain()
    turns.pipelined(seed=0)
    assert turns.differing == 0
    assert turns.tokens == count
    assert turns.runs == LOOPS + (count - 1) * runs


def test_the_costs_are_those_of_one_row_to_all_loops_of_two_sequences(package: Path) -> None:
    costs = run_costs(Runtime.load(package), context=5, rounds=1)
    assert [row["rows"] for row in costs] == [1, 2, 3, 4, 8]
    assert costs[0]["times_one"] == 1


def test_speed_needs_what_the_trained_model_did(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="trained"):
        speed(tmp_path, pipelined.Settings(), no_step, {})


def test_the_document_and_the_picture_show_every_section(report: dict[str, Any], tmp_path: Path) -> None:
    text = pipelined_docs.part(report)
    for title in ("The tokens are those of plain decoding", "Runs per token: LoopLM", "Tokens per second"):
        assert f"### {title}" in text
    assert "| int4 cache |" in text
    assert "| hard | 4 | 1 | loop 1 alone | 0 | 2 of 2 |" in text
    pipelined_docs.plot(report, tmp_path / "pipelined.png")
    assert (tmp_path / "pipelined.png").stat().st_size > 10_000
    pipelined_docs.plot({"trained": report["trained"]}, tmp_path / "alone.png")
    assert "### Tokens per second" not in pipelined_docs.part({"trained": report["trained"]})


def test_tokens_that_leave_early_are_counted_both_ways(report: dict[str, Any]) -> None:
    section = report["adaptive"]
    assert len(section["results"]) == len(pipelined_adaptive.CRITERIA)
    none, *others = section["results"]
    assert none["plain"]["runs_per_token"] == none["plain"]["loops_per_token"] == LOOPS
    assert none["pipelined"]["runs_per_token"] < LOOPS
    for row in others:
        assert row["plain"]["loops_per_token"] < LOOPS
        assert row["pipelined"]["runs_per_token"] <= row["plain"]["runs_per_token"]
    assert "| `exit_kl` 0.01 |" in pipelined_docs.part(report)


def test_a_melt_has_its_place_beside_the_looplm(report: dict[str, Any]) -> None:
    assert "### Runs per token: LoopLM" in (text := pipelined_docs.part(report))
    assert "### Runs per token: MELT" in text
    for row in report["melt"]["results"]:
        assert row["modes"]["plain"]["same"] == 2
        assert row["modes"]["every loop"]["runs_per_token"] < row["loops"]
