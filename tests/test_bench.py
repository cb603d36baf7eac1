"""``melt-run bench`` measures what it says, packages in turn. Mechanics only: no figure that depends on time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import ArgumentError, LoopSettings, Runtime
from melt_runtime.bench import pipelining
from melt_runtime.bench import sweep as module
from melt_runtime.bench.stopwatch import Stopwatch, overhead
from melt_runtime.bench.sweep import Sweep, bench, loop_bytes, spread
from melt_runtime.cli.main import app
from melt_runtime.machine import ReadBandwidth
from melt_runtime.package.reader import Package
from typer.testing import CliRunner

ADDITION = Path(__file__).parent.parent / "examples" / "addition-melt"
QUICK = {"prompt": 10, "tokens": 1, "rounds": 2, "threads": (1,)}


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads a megabyte instead of what real figures need."""
    monkeypatch.setattr(ReadBandwidth.__init__, "__defaults__", (1 << 20,))


@pytest.fixture(scope="module")
def looplm(make_looplm: MakeCheckpoint, make_package: MakePackage) -> Path:
    return make_package(make_looplm(), chunk=8)


@pytest.fixture(scope="module")
def addition(make_package: MakePackage) -> Runtime:
    return Runtime.load(make_package(ADDITION, max_batch=32))


def test_a_sweep_runs_every_combination_of_every_package(tiny_package: Path, looplm: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ["--context", "0,20", "--loops", "1,2", "--batch", "1,3", "--chunk", "4,8", "--threads", "1"]
    options += ["--prompt", "10", "--tokens", "1", "--rounds", "1", "--json", str(file), "--against", str(looplm)]
    result = CliRunner().invoke(app, ["bench", str(tiny_package), *options])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text(encoding="utf-8"))
    assert len(report["results"]) == 2 * 2 * 2 * 2 * 2
    names = ("package", "context", "loops", "batch", "chunk")
    assert len({tuple(row[name] for name in names) for row in report["results"]}) == 32
    for row in report["results"]:
        for name in ("first_token_s", "prefill_tokens_s", "decode_tokens_s", "token_ms", "loop_ms", "bandwidth_share"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
    assert [found["model_type"] for found in report["packages"]] == ["melt", "ouro"]
    assert report["packages"][0]["state_bytes"] == Package.open(tiny_package).manifest.state_bytes(3)
    assert all(found["peak_bytes"] >= found["loaded_bytes"] > 0 for found in report["packages"])
    assert str(tmp_path) not in file.read_text(encoding="utf-8")
    assert "of bandwidth" in result.output


def test_packages_take_turns(tiny_package: Path, looplm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visits: list[str] = []
    decode = Stopwatch.decode

    def noted(self: Stopwatch, context: int, loops: int, tokens: int) -> tuple[float, float]:
        visits.append(self.driver.manifest.model["model_type"])
        return decode(self, context, loops, tokens)

    monkeypatch.setattr(Stopwatch, "decode", noted)
    monkeypatch.setattr(module, "peak_memory", lambda *_: {"loaded_bytes": None, "peak_bytes": None})
    report = bench([tiny_package, looplm], Sweep(**QUICK))  # type: ignore[arg-type]
    assert visits == ["melt", "ouro"] * 3  # two rounds, and one before that does not count
    first, rival = report["results"]
    assert first["time_against_first"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert rival["time_against_first"]["median"] > 0


def test_pipelined_decoding_is_swept_from_a_real_prompt(looplm: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ["--pipeline", "off,on,auto", "--context", "0,20", "--tokens", "12", "--rounds", "1", "--threads", "1"]
    result = CliRunner().invoke(app, ["bench", str(looplm), *options, "--prompt", "10", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = {(row["context"], row["pipeline"]): row for row in json.loads(file.read_text(encoding="utf-8"))["results"]}
    assert set(rows) == {(context, way) for context in (0, 20) for way in ("off", "on", "auto")}
    for (context, way), row in rows.items():
        assert row["time_against_plain"]["median"] > 0
        if way == "off":
            assert row["runs_per_token"]["median"] == 4
            assert row["time_against_plain"]["median"] == 1
        if way == "on":
            runtime = Runtime.load(looplm)
            prompt = pipelining.prompt_ids(runtime, context + 1)
            assert len(prompt) == context + 1
            use = runtime.generate(prompt, pipeline="on", max_tokens=14, ignore_eos=True).pipeline
            assert use is not None
            # generate drafts nothing after its last token and so ends with fewer tokens per run.
            assert 1 <= row["runs_per_token"]["median"] <= use.runs / 12
            assert row["runs_per_token"]["median"] < 4
    assert "runs/token" in result.output
    assert "against plain" in result.output


def test_an_example_prompt_is_repeated_up_to_the_context(addition: Runtime) -> None:
    ids = addition.encode(addition.example_prompt or "")
    assert pipelining.prompt_ids(addition, 40) == (ids * 3)[:40]


def test_without_the_option_tokens_are_plain(looplm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "peak_memory", lambda *_: {"loaded_bytes": None, "peak_bytes": None})
    monkeypatch.setattr(module, "decode_from_prompt", None)
    [row] = bench([looplm], Sweep(**QUICK))["results"]  # type: ignore[arg-type]
    assert row["pipeline"] is None
    assert row["time_against_plain"] is None
    assert row["runs_per_token"]["median"] == row["loops"] == 4


@pytest.mark.parametrize("context", [0, 100])
def test_bytes_a_loop_are_weights_rows_and_state(tiny_package: Path, looplm: Path, context: int) -> None:
    d, mlp, kv, layers = 64, 96, 32, 2
    stack = 2 * d * d + 2 * d * kv + 3 * d * mlp + 4 * d  # q, o; k, v; the MLP; four norms
    shared = d + d + 1  # final norm, exit gate
    gate = (2 * d * d + d) * 3 / 4  # not in the first of four loops
    rows = layers * 2 * kv * (context + 1) * 4
    melt, ouro = (loop_bytes(Package.open(package), context) for package in (tiny_package, looplm))
    assert ouro["cache"] == melt["cache"] == rows
    assert melt["state"] == 2 * 4 * (d + layers * d)
    assert ouro["state"] == 2 * 4 * d
    assert 0 <= ouro["weights"] - 4 * (layers * stack + shared) < 512  # a few small constants
    assert 0 <= melt["weights"] - 4 * (layers * (stack + gate) + shared) < 512


def test_measuring_runs_the_same_loops_as_generating(tiny_package: Path) -> None:
    runtime = Runtime.load(tiny_package)
    driver = runtime.driver()
    Stopwatch(driver).prefill(10, 8, 3)
    expected = runtime.driver()
    expected.append([[0] * 10], LoopSettings(3))
    rows = (0, slice(None), slice(10))
    assert (driver.state.read("key_cache.1", rows) == expected.state.read("key_cache.1", rows)).all()


def test_tokens_are_timed_on_the_road_that_generation_takes(
    tiny_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole token in one call, which a backend may run as one graph."""
    runtime, calls = Runtime.load(tiny_package), list[tuple[object, ...]]()
    kind = type(runtime.driver().state)
    run_chunk, loop = kind.run_chunk, kind.loop

    def chunk_noted(self: Any, ids: Any, control: Any, loops: int, head: bool, *rest: Any) -> None:
        calls.append(("chunk", ids.shape, control.lengths.tolist(), loops, head))
        run_chunk(self, ids, control, loops, head, *rest)

    def loop_noted(self: Any, control: Any) -> Any:
        calls.append(("loop", control))
        return loop(self, control)

    monkeypatch.setattr(kind, "run_chunk", chunk_noted)
    monkeypatch.setattr(kind, "loop", loop_noted)
    runtime.generate([0] * 10, max_tokens=4, ignore_eos=True, loops=3)
    generated, calls[:] = calls[-3:], []  # the prompt's chunks come first
    Stopwatch(runtime.driver()).decode(10, 3, 2)
    assert calls[:3] == generated == [("chunk", (1, 1), [10 + at], 3, True) for at in range(3)]
    assert calls[3:] == [("chunk", (1, 1), [10], 3, False)] * 3  # loops alone


def test_overhead_is_a_share_and_leaves_the_runtime_as_it_was(tiny_package: Path) -> None:
    runtime = Runtime.load(tiny_package)
    before = dict(runtime.backend.sessions)  # type: ignore[attr-defined]
    share = overhead(runtime, tokens=4)
    assert share is not None
    assert 0 < share < 1
    assert runtime.backend.sessions == before  # type: ignore[attr-defined]


def test_read_bandwidth_reads_every_byte_it_counts() -> None:
    bandwidth = ReadBandwidth(2, 1 << 20)
    assert sum(part.nbytes for part in bandwidth._parts) == 1 << 20
    assert bandwidth.measure() > 0
    bandwidth.close()


def test_a_spread_is_median_and_quartiles() -> None:
    assert spread([1, 2, 3, 4, 5]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert spread([]) is None


def test_without_a_length_the_prompt_is_as_long_as_every_package_allows(
    tiny_package: Path, make_package: MakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "peak_memory", lambda *_: {"loaded_bytes": None, "peak_bytes": None})
    demo = make_package(ADDITION, max_batch=32)
    report = bench([tiny_package, demo], Sweep(tokens=1, rounds=1))
    assert {row["prompt_tokens"] for row in report["results"]} == {64}


# Refusals: before anything is loaded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "256"], "holds 256 tokens; the sweep needs 257"),
        (["--batch", "9"], "at most 8 sequences"),
        (["--chunk", "16"], "a chunk of at most 8"),
        (["--loops", "0"], "loops is 0"),
        (["--context", "x"], "--context takes whole numbers"),
        (["--rounds", "0"], "rounds is 0"),
        (["--pipeline", "off,yes"], "it must be one of auto, on, off"),
        (["--pipeline", "on", "--batch", "2"], "with one sequence"),
        (["--pipeline", "on", "--context", "230"], "the sweep needs 263"),
        (["--json", "nowhere/at/all.json"], "its directory does not exist"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(tiny_package: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", str(tiny_package), "--prompt", "8", *options])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_more_loops_than_a_rival_has_caches_for_are_refused(tiny_package: Path, looplm: Path) -> None:
    with pytest.raises(ArgumentError, match="caches for 4"):
        bench([tiny_package, looplm], Sweep(loops=(8,), prompt=8))


def test_a_package_that_cannot_be_pipelined_says_why(make_looplm: MakeCheckpoint, make_package: MakePackage) -> None:
    single = make_package(make_looplm(), chunk=8, dialect="standard", max_batch=1)
    with pytest.raises(ArgumentError, match="--max-batch 1"):
        bench([single], Sweep(pipelines=("on",), **QUICK))  # type: ignore[arg-type]
