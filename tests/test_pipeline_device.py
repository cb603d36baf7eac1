"""Pipelined decoding on stand-ins for devices (see device_double.py): the shared state code, not CUDA or TensorRT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, MakePackage
from device_double import HostDevice, add_plans, stand_in
from melt_runtime import ArgumentError, Package, Request, Runtime, Scheduler
from melt_runtime.backends.execution import Bound
from melt_runtime.backends.tensorrt import TensorRTBackend
from test_device_state import ControlsOnTheHost, OnStandIn

PROMPTS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9], [5, 6], [40, 2, 7, 7]]
ASKED: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoints(make_checkpoint: MakeCheckpoint, make_looplm: MakeCheckpoint) -> dict[str, Path]:
    # Hidden states of 64 float32 begin at multiples of 256 bytes, as TensorRT wants them.
    return {"looplm": make_looplm(), "melt": make_checkpoint()}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """The stand-in, which every TensorRT backend of the test opens."""
    return stand_in(monkeypatch)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("kind", ["looplm", "melt"])
def test_tensorrt_gives_the_tokens_of_the_cpu(
    checkpoints: dict[str, Path],
    make_package: MakePackage,
    tmp_path: Path,
    device: HostDevice,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    graphs: bool,
) -> None:
    profiles, bound = set[tuple[str, int]](), Bound.of

    def noted(graph: str, profile: int, *rest: Any) -> Bound:
        profiles.add((graph, profile))
        return bound(graph, profile, *rest)

    monkeypatch.setattr(Bound, "of", noted)
    source = make_package(checkpoints[kind], dialect="standard", chunk=8)
    directory = Path(shutil.copytree(source, tmp_path / "package"))
    add_plans(directory)
    cpu = Runtime.load(source, backend="onnxruntime")
    ours = Runtime(Package.open(directory), TensorRTBackend(Package.open(directory), graphs=graphs), None)
    for options in ({}, {"temperature": 0.8, "seed": 3}):
        for prompt in PROMPTS:
            expected = cpu.generate(prompt, pipeline="on", **ASKED, **options)
            found = ours.generate(prompt, pipeline="on", **ASKED, **options)
            assert found == expected
            assert found.pipeline is not None
            assert found.pipeline == expected.pipeline
    with ours._states.lease(1) as lease:
        assert lease.driver is not None
        state: Any = lease.driver.state
        captured = [key for key in state.captured() if key[0] == "lanes"]
    assert bool(captured) is graphs
    used = {state.spec.profiles[profile].name for graph, profile in profiles if graph == "loop_step"}
    assert used == {"prefill", "pipelined"}


@pytest.mark.parametrize("backend", [OnStandIn, ControlsOnTheHost])
@pytest.mark.parametrize("dialect", ["onnxruntime", "standard", "portable"])
@pytest.mark.parametrize("kind", ["looplm", "melt"])
def test_onnx_runtime_on_a_device_gives_the_tokens_of_the_cpu(
    checkpoints: dict[str, Path], make_package: MakePackage, kind: str, dialect: str, backend: type[OnStandIn]
) -> None:
    package = make_package(checkpoints[kind], dialect=dialect, chunk=8)
    cpu, ours = Runtime.load(package), Runtime(Package.open(package), backend(Package.open(package)), None)
    for prompt in PROMPTS:
        expected = cpu.generate(prompt, pipeline="on", **ASKED)
        found = ours.generate(prompt, pipeline="on", **ASKED)
        assert found == expected
        assert found.pipeline == expected.pipeline


def test_a_scheduler_shares_runs_on_a_device(
    checkpoints: dict[str, Path], make_package: MakePackage, tmp_path: Path, device: HostDevice
) -> None:
    source = make_package(checkpoints["looplm"], dialect="standard", chunk=8, max_batch=12)
    directory = Path(shutil.copytree(source, tmp_path / "package"))
    add_plans(directory)
    cpu = Runtime.load(source, backend="onnxruntime")
    ours = Runtime(Package.open(directory), TensorRTBackend(Package.open(directory)), None)
    with Scheduler(ours, slots=3) as scheduler:
        options = ours.options(pipeline="on", **ASKED)
        handles = [scheduler.submit(Request(tuple(prompt), options)) for prompt in PROMPTS]
        results = [handle.result() for handle in handles]
    assert results == [cpu.generate(prompt, pipeline="off", **ASKED) for prompt in PROMPTS]


@pytest.mark.parametrize("graphs", [True, False])
def test_a_scheduler_shares_runs_of_a_melt_on_a_device(
    checkpoints: dict[str, Path], make_package: MakePackage, tmp_path: Path, device: HostDevice, graphs: bool
) -> None:
    source = make_package(checkpoints["melt"], dialect="standard", chunk=8, max_batch=12)
    directory = Path(shutil.copytree(source, tmp_path / "package"))
    add_plans(directory)
    cpu = Runtime.load(source, backend="onnxruntime")
    ours = Runtime(Package.open(directory), TensorRTBackend(Package.open(directory), graphs=graphs), None)
    with Scheduler(ours, slots=3) as scheduler:
        options = ours.options(pipeline="on", **ASKED)
        handles = [scheduler.submit(Request(tuple(prompt), options)) for prompt in PROMPTS]
        results = [handle.result() for handle in handles]
        assert scheduler.metrics().pipeline_tokens == 3 * (ASKED["max_tokens"] - 1)
    assert results == [cpu.generate(prompt, pipeline="on", **ASKED) for prompt in PROMPTS]


def test_an_engine_of_too_few_rows_says_so(
    checkpoints: dict[str, Path], make_package: MakePackage, tmp_path: Path, device: HostDevice
) -> None:
    source = make_package(checkpoints["looplm"], dialect="standard", chunk=8, max_batch=2)
    directory = Path(shutil.copytree(source, tmp_path / "package"))
    add_plans(directory)
    ours = Runtime(Package.open(directory), TensorRTBackend(Package.open(directory)), None)
    with pytest.raises(ArgumentError, match="batch 4"):
        ours.generate(PROMPTS[0], pipeline="on", **ASKED)
    assert ours.generate(PROMPTS[0], **ASKED).pipeline is None
