"""ONNX Runtime on a device, with a stand-in for the device: all but CUDA's own calls and kernels.

The stand-in's stream works only when it is waited for, so that whoever reads or runs too early gets wrong values.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import MakePackage
from device_double import HostDevice
from melt_runtime import LoopSettings, Runtime
from melt_runtime.backends.device_memory import DeviceBuffers
from melt_runtime.backends.onnxruntime_cuda import DeviceBackend, in_device_memory, require_states_on_device
from melt_runtime.errors import BackendError
from melt_runtime.package.reader import Package
from melt_runtime.package.specs import DIALECTS

STATES = ("hidden", "latent", "injected", "key_cache", "value_cache", "prelude_", "coda_")


class CountedBuffers(DeviceBuffers):
    """The buffers of a device, which ONNX Runtime is told are on the CPU; ``crossed``: bytes up and down."""

    kind = "cpu"
    crossed = 0

    def upload(self, buffer: str, count: int) -> None:
        self.crossed += count
        super().upload(buffer, count)

    def download(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
        values = super().download(buffer, dtype, shape, offset)
        self.crossed += values.nbytes
        return values


class OnStandIn(DeviceBackend):
    """The CPU provider behind everything else of a device. ``controls``: whether those too are read on the device."""

    name = "onnxruntime-on-a-stand-in"
    controls = True

    def open_device(self) -> HostDevice:
        device = HostDevice()
        device.index = 0  # type: ignore[attr-defined]
        return device

    def session(self, graph: str) -> Any:
        return self.load(graph, self.options(), ["CPUExecutionProvider"])

    def reads_on_device(self, session: Any) -> dict[str, bool]:
        return {spec.name: self.controls or spec.name.startswith(STATES) for spec in session.get_inputs()}

    def buffers(self, sizes: dict[str, int], staged: Iterable[str]) -> CountedBuffers:
        return CountedBuffers(self.device, sizes, staged)


class ControlsOnTheHost(OnStandIn):
    controls = False


@pytest.fixture(scope="module")
def packages(make_package: MakePackage, tiny_checkpoint: Path) -> dict[str, Path]:
    """A package a dialect."""
    return {dialect: make_package(tiny_checkpoint, dialect=dialect, max_batch=3) for dialect in DIALECTS}


def runtimes(package: Path, backend: type[OnStandIn]) -> tuple[Runtime, Runtime]:
    """The package on the device and on the CPU."""
    opened = Package.open(package)
    on_cpu = Runtime.load(package, backend="onnxruntime")
    return Runtime(opened, backend(opened), on_cpu.tokenizer), on_cpu


@pytest.mark.parametrize("backend", [OnStandIn, ControlsOnTheHost])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_device_computes_what_the_cpu_computes(
    packages: dict[str, Path], dialect: str, backend: type[OnStandIn]
) -> None:
    device, cpu = runtimes(packages[dialect], backend)
    prompts = [list(range(3, 22)), [7, 8], list(range(5, 14))]
    for options in ({"loops": 4}, {"loops": 3, "exit_threshold": 0.6}):
        for one, other in zip(
            device.generate(prompts, max_tokens=9, ignore_eos=True, **options),
            cpu.generate(prompts, max_tokens=9, ignore_eos=True, **options),
            strict=True,
        ):
            assert (one.token_ids, one.depth) == (other.token_ids, other.depth)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_states_can_be_read_back_from_a_device(packages: dict[str, Path], dialect: str) -> None:
    sessions = [runtime.driver(2) for runtime in runtimes(packages[dialect], OnStandIn)]
    for session in sessions:
        session.append([[3, 4, 5, 6], [9, 8]], LoopSettings(2))
    for state in sessions[0].manifest.states:
        np.testing.assert_array_equal(*(session.state.read(state.input) for session in sessions))


def test_only_controls_exit_probabilities_and_logits_cross(packages: dict[str, Path]) -> None:
    device, _ = runtimes(packages["onnxruntime"], OnStandIn)
    session = device.driver()
    session.append([[3, 4, 5]], LoopSettings(2))
    buffers = session.state.buffers
    before = buffers.crossed
    session.append([[6]], LoopSettings(4))
    logits = 4 * device.manifest.vocab_size
    controls = 8 + 8 + 8 + 1  # a token id, two lengths, and who is active
    assert buffers.crossed - before == logits + controls


def test_a_graph_that_would_run_on_the_cpu_is_refused(packages: dict[str, Path]) -> None:
    manifest = Package.open(packages["standard"]).manifest
    here = {graph: {tensor.name: True for tensor in spec.inputs} for graph, spec in manifest.graphs.items()}
    require_states_on_device(manifest, here)
    here["loop_step"]["key_cache.1"] = False
    with pytest.raises(BackendError, match=r"key_cache\.1 in the standard dialect and fp32 .* --precision fp16"):
        require_states_on_device(manifest, here)
    here["loop_step"]["key_cache.1"], here["lm_head"]["hidden"] = True, False
    with pytest.raises(BackendError, match="hidden in the head"):
        require_states_on_device(manifest, here)


@pytest.mark.parametrize(
    ("name", "kind", "there"),
    [
        ("Cpu", "OrtDeviceMemoryType.DEFAULT", False),
        ("Cuda", "OrtDeviceMemoryType.DEFAULT", True),
        ("CudaPinned", "OrtDeviceMemoryType.HOST_ACCESSIBLE", False),
        ("NvTensorRtRtx", "OrtDeviceMemoryType.DEFAULT", True),
    ],
)
def test_where_an_input_is_read_is_told_by_its_memory(name: str, kind: str, there: bool) -> None:
    assert in_device_memory(SimpleNamespace(name=name, device_mem_type=kind)) is there


def test_a_device_without_room_refuses_before_anything_is_allocated() -> None:
    device = HostDevice(total=5000)
    device.index = 0  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match=r"needs 5,376 bytes of device memory, 5,000 are free .* smaller batch"):
        DeviceBuffers(device, {"hidden": 4097, "active": 1000}, ["active"])  # type: ignore[arg-type]
    assert device.made == 0


def test_nothing_stays_allocated_when_pinned_memory_runs_out() -> None:
    device = HostDevice(fails="pinned")
    device.index = 0  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="out of memory"):
        DeviceBuffers(device, {"hidden": 4096, "active": 1000}, ["active"])  # type: ignore[arg-type]
    assert device.live == []
