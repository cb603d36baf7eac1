"""TensorRT on a real device, held to ONNX Runtime on the CPU. Skipped where there is none; CI has none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import BackendError, LoopSettings, Package, Request, Runtime, Scheduler
from melt_runtime.backends.cuda import Device, open_device
from melt_runtime.backends.tensorrt import TensorRTBackend
from melt_runtime.engines.build import EngineOptions, build_engine
from melt_runtime.engines.library import open_library
from melt_runtime.errors import MeltError
from test_concurrency import calls_of, together

from melt_export.parity.verify import verify

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18], [19, 20, 21, 22]]


@pytest.fixture(scope="module")
def device() -> Device:
    """The first device, or why there is none."""
    try:
        return open_device()
    except MeltError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt"])
def flavour(request: pytest.FixtureRequest, device: Device) -> str:
    """A library that is installed here."""
    try:
        open_library(request.param)
    except BackendError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(scope="module", params=["standard", "portable"])
def directory(
    request: pytest.FixtureRequest,
    flavour: str,
    make_checkpoint: MakeCheckpoint,
    make_package: MakePackage,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small fp32 package with an engine for this device."""
    source = make_package(make_checkpoint(), dialect=request.param)
    copy = Path(shutil.copytree(source, tmp_path_factory.mktemp("gpu") / "package"))
    build_engine(Package.open(copy), EngineOptions(flavour))
    return copy


def load(directory: Path, graphs: bool = True) -> Runtime:
    """A package in the TensorRT backend."""
    package = Package.open(directory)
    return Runtime(package, TensorRTBackend(package, graphs=graphs), None)


def test_every_loop_is_onnx_runtimes(directory: Path) -> None:
    ours, theirs = load(directory).driver(3), Runtime.load(directory, backend="onnxruntime").driver(3)
    for tokens in (PROMPTS, [[5], [6], []], [[7], [8], [9]]):
        for chunk in ours.chunks(tokens):
            loops = zip(ours.loops(chunk, LoopSettings(4)), theirs.loops(chunk, LoopSettings(4)), strict=True)
            for _ in loops:
                real = np.arange(chunk.ids.shape[1]) < chunk.counts[:, None]
                mine, other = (s.state.read("hidden")[real] for s in (ours, theirs))
                np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-3)
                mine, other = (s.state.read("latent")[:, real] for s in (ours, theirs))
                np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-3)
                mine, other = (s.state.exit_probability()[real] for s in (ours, theirs))
                np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4)
            columns = np.maximum(chunk.counts - 1, 0)[:, None]
            mine, other = (s.state.logits(columns)[chunk.counts > 0] for s in (ours, theirs))
            np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("threshold", [1.0, 0.85])
def test_graphs_plain_runs_and_onnx_runtime_give_the_same_tokens(directory: Path, threshold: float) -> None:
    asked: dict[str, Any] = {"max_tokens": 100, "exit_threshold": threshold, "ignore_eos": True}
    captured, plain = load(directory), load(directory, graphs=False)
    found = [
        runtime.generate(PROMPTS, **asked)
        for runtime in (captured, plain, Runtime.load(directory, backend="onnxruntime"))
    ]
    assert [g.token_ids for g in found[0]] == [g.token_ids for g in found[1]] == [g.token_ids for g in found[2]]
    with captured._states.lease(len(PROMPTS)) as lease:  # the state that has just been used
        assert lease.driver is not None
        assert lease.driver.state.captured()  # type: ignore[attr-defined]


def test_graphs_and_plain_runs_give_the_same_logits_to_the_last_bit(directory: Path) -> None:
    drivers = [load(directory, graphs).driver() for graphs in (True, False)]
    pending = [PROMPTS[0]]
    for _ in range(12):
        captured, plain = (driver.append(pending, LoopSettings(4)) for driver in drivers)
        np.testing.assert_array_equal(captured, plain)
        pending = [[int(captured[0].argmax())]]


def test_melt_verify_holds_an_engine_to_pytorch(directory: Path, make_checkpoint: MakeCheckpoint) -> None:
    report = verify(directory, make_checkpoint(), backend="tensorrt", tokens=16)
    assert report.failures() == []
    assert "TensorRT" in report.arithmetic


def test_calls_of_several_threads_give_what_each_gives_alone(directory: Path) -> None:
    calls = calls_of(load(directory))
    alone = [call() for call in calls]
    for one, rounds in zip(alone, together(calls, 3), strict=True):
        assert rounds == [one] * 3


def test_a_part_of_a_batch_computes_what_the_whole_does(directory: Path) -> None:
    whole, deltas = load(directory).driver(3), load(directory).driver(3)
    for tokens in (PROMPTS, [[5], [6], [7]], [[8], [9], [10]]):
        expected = whole.append(tokens, LoopSettings(3))
        for slot in (2, 0, 1):
            part = deltas.part(slot, 1)
            assert part is not None
            found = part.append([tokens[slot]], LoopSettings(3))
            np.testing.assert_allclose(found[0], expected[slot], rtol=1e-3, atol=1e-3)


def test_a_scheduler_gives_what_a_request_gets_alone(directory: Path) -> None:
    runtime = load(directory)
    options = [runtime.options(max_tokens=20 + at, loops=2 + at, ignore_eos=True) for at in range(3)]
    with Scheduler(runtime, 2) as scheduler:
        handles = [scheduler.submit(Request(tuple(prompt), one)) for prompt, one in zip(PROMPTS, options, strict=True)]
        found = [handle.result(300).token_ids for handle in handles]
    for at, prompt in enumerate(PROMPTS):
        assert found[at] == runtime.generate(prompt, max_tokens=20 + at, loops=2 + at, ignore_eos=True).token_ids


def test_candidates_draw_what_whole_rows_draw(directory: Path) -> None:
    asked: dict[str, Any] = {"max_tokens": 40, "temperature": 0.7, "top_p": 0.8, "seed": 3, "ignore_eos": True}
    found = load(directory).generate(PROMPTS[0], **asked)
    assert found.token_ids == Runtime.load(directory, backend="onnxruntime").generate(PROMPTS[0], **asked).token_ids


def test_device_memory_is_flat_over_loops(directory: Path, device: Device) -> None:
    driver = load(directory).driver()
    free = []
    for loops in (16, 1, 4, 16, 1, 4, 16):
        driver.reset()
        for tokens in (PROMPTS[0], [5], [6], [7]):
            driver.append([tokens], LoopSettings(loops))
        free.append(device.memory()[0])
    assert free[-1] >= min(free[1:4])


def test_a_state_too_large_for_the_device_is_refused_and_takes_nothing(
    directory: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = load(directory)
    before = device.memory()[0]
    held = device.allocate(before - (8 << 20))
    monkeypatch.setattr(runtime.backend.graph_engines["embed"], "scratch_bytes", 1 << 30)  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match=r"needs [0-9,]+ bytes of device memory .* are free on"):
        runtime.driver()
    held.free()
    assert device.memory()[0] >= before - (4 << 20)


def test_events_measure_what_lies_between_them(device: Device) -> None:
    stream, memory = device.stream(), device.allocate(64 << 20)
    start = stream.record()
    for value in range(20):
        stream.fill(memory.address, value, memory.bytes)
    end = stream.record()
    end.wait()
    assert end.since(start) > 0
