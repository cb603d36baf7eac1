"""A small version of the benchmark of what the runtime reaches. Mechanics only: nothing depends on time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import compare
import compare_docs
from common import loaded_machine, save, versions

SECTIONS = ("decode", "buffer", "loops", "long")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every section but SmolLM2's, in a small size."""
    directory = tmp_path_factory.mktemp("comparison")
    settings = compare.Settings(**{**compare.QUICK, "rounds": 1, "threads": 1})
    found = {name: getattr(compare, name)(directory, settings, lambda *_: None) for name in SECTIONS}
    about = {"date": "today", "command": "python benchmarks/compare.py --quick", "machine": loaded_machine()}
    shown = {**vars(settings), "export": " ".join(settings.export)}
    return {**about, "versions": versions("onnxruntime"), "settings": shown, **found}


def test_rivals_run_at_every_context(report: dict[str, Any]) -> None:
    rows = {(row["package"].partition("-")[0], row["context"]) for row in report["decode"]["results"]}
    assert rows == {(name, context) for name in ("melt", "looplm") for context in (10, 100)}
    assert set(report["decode"]["eager"]) == {"fp32/10", "bf16/10"}
    assert report["decode"]["eager"]["bf16/10"]["eager bf16"]["token_s"]["median"] > 0


def test_a_looplm_has_a_cache_for_every_loop(report: dict[str, Any]) -> None:
    cache = report["decode"]["cache_bytes"]
    assert cache["looplm"] == report["settings"]["loops"] * cache["melt"]


def test_state_is_the_same_for_one_loop_and_for_sixteen(report: dict[str, Any]) -> None:
    one, many = (report["loops"][count]["state_bytes"] for count in ("1", "16"))
    assert one == many > 0


def test_an_int4_cache_has_half_the_bytes_of_an_int8_one(report: dict[str, Any]) -> None:
    assert 2 * report["long"]["int4"]["cache_bytes"] == report["long"]["int8"]["cache_bytes"]


def test_the_document_and_its_pictures_show_every_section(report: dict[str, Any], tmp_path: Path) -> None:
    text = compare_docs.part(report)
    for title in ("Decoding at the 1.4B shape", "a large buffer", "More loops, the same memory", "512 tokens"):
        assert title in text
    assert "2 times as many at 2 loops" in text
    compare_docs.plots(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"decode.png", "memory.png"}


def test_the_document_tells_threads_that_were_chosen_and_peaks_that_no_one_measured(report: dict[str, Any]) -> None:
    threads = {"eager fp32": {"threads": 2}, "melt-1024-block-128": {"threads": 1}}
    unmeasured = {**report["long"]["int8"], "1 loops": {"peak_bytes": None}}
    text = compare_docs.part(
        {**report, "decode": {**report["decode"], "threads": threads}, "long": {"int8": unmeasured}}
    )
    assert "each with its fastest number of threads (PyTorch fp32: 2, MELT, blocks of 128: 1):" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| int8 |"))
    assert " | - | " in row


@pytest.mark.parametrize(("most", "counts"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_rivals_are_tried_with_all_sensible_numbers_of_threads(most: int, counts: tuple[int, ...]) -> None:
    assert compare.Settings(threads=most).thread_counts == counts


def test_the_document_shows_every_number_of_threads_and_each_rivals_best(report: dict[str, Any]) -> None:
    def sample(token_ms: float) -> dict[str, Any]:
        one = {"low": token_ms / 1e3, "median": token_ms / 1e3, "high": token_ms / 1e3}
        return {"token_s": one, "prefill_s": one, "time_against_first": one}

    turns = {
        "melt, 2 threads": sample(8),
        "onnxruntime-genai, 2 threads": sample(5),
        "melt, 1 thread": sample(9),
        "onnxruntime-genai, 1 thread": sample(8),
    }
    bench = {"results": [{"overhead_share": {"median": 0.02}}]}
    beside = {"melt, 2 threads": sample(20), "melt": sample(10), "onnxruntime-genai, 1 thread": sample(8)}
    section = {"turns": {"10": turns}, "bench": bench, "genai": {"builder": "-p int4 -e cpu"}}
    section["beside"] = {"1": {"10": beside}}
    text = compare_docs.part({**report, "smollm2": section})
    assert "| onnxruntime-genai | 2 | 0 | 10 | 5.00 (5.00 to 5.00) | 200.0 |" in text
    assert "| MELT, one loop | default | 1 | 10 | 10.00 (10.00 to 10.00) | 100.0 |" in text
    best = "MELT, one loop 100.0 tokens/s (default), onnxruntime-genai 125.0 tokens/s (1)"
    assert f"beside 1 busy process: {best}" in text
    assert "MELT, one loop 125.0 tokens/s (2), onnxruntime-genai 200.0 tokens/s (2)" in text
    assert "`-p int4 -e cpu`" in text


def test_a_rival_that_is_not_there_is_left_out_with_the_reason(report: dict[str, Any]) -> None:
    text = compare_docs.part({**report, "smollm2": {"skipped": "gguf is not installed"}})
    assert "Not measured: gguf is not installed." in text


def test_a_setting_that_is_new_keeps_the_others_and_one_that_changed_does_not(
    report: dict[str, Any], tmp_path: Path
) -> None:
    save(path := tmp_path / "benchmarks.json", "comparison", report)
    for settings, joined in (({"new": 1}, True), ({"rounds": -1}, False)):
        again = {name: report[name] for name in report if name not in SECTIONS}
        again["settings"] = {**report["settings"], **settings}
        assert ("decode" in compare._joining(path, again, ["loops"])) is joined


def test_a_section_measured_again_joins_the_others(report: dict[str, Any], tmp_path: Path) -> None:
    save(path := tmp_path / "benchmarks.json", "comparison", report)
    again = {**report, "date": "tomorrow", "command": "python benchmarks/compare.py loops"}
    joined = compare._joining(path, {name: again[name] for name in again if name not in SECTIONS}, ["loops"])
    assert joined["decode"] == json.loads(path.read_text())["comparison"]["decode"]
    text = compare_docs.part(joined)
    assert "- Date: today" in text
    assert "- Measured by itself: more loops, tomorrow, load average" in text
    assert "`python benchmarks/compare.py loops`" in text


def test_a_run_with_other_settings_joins_nothing(report: dict[str, Any], tmp_path: Path) -> None:
    save(path := tmp_path / "benchmarks.json", "comparison", report)
    other = {"settings": {**report["settings"], "loops": 3}}
    assert compare._joining(path, other, ["loops"]) is other
    assert compare._joining(tmp_path / "none.json", other, ["loops"]) is other
