"""ONNX Runtime on a device, with the host's memory in the device's place: all but CUDA's own calls.

The buffers below are two blocks that know nothing of each other until something is uploaded or downloaded, as a device
and its host are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import MakePackage
from melt_runtime import LoopSettings, Runtime
from melt_runtime.backends.device_memory import layout
from melt_runtime.backends.onnxruntime_cuda import DeviceBackend, in_device_memory, require_states_on_device
from melt_runtime.backends.state import Strip
from melt_runtime.errors import BackendError
from melt_runtime.package import DIALECTS, Package

STATES = ("hidden", "latent", "key_cache", "value_cache")


class TwoBlocks:
    """A device's block and the host's, both in this process's memory."""

    kind, index = "cpu", 0

    def __init__(self, sizes: dict[str, int], twins: Iterable[str]):
        self.offsets, total = layout(sizes)
        self.twin_offsets, pinned = layout({name: sizes[name] for name in twins})
        self.device, self.twins = np.zeros(total, np.uint8), np.zeros(pinned, np.uint8)
        self.crossed = 0

    def address(self, buffer: str) -> int:
        return self.device.ctypes.data + self.offsets[buffer]

    def host(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        return np.ndarray(shape, dtype, self.twins.data, self.twin_offsets[buffer])

    def upload(self, buffer: str, count: int) -> None:
        at, to = self.twin_offsets[buffer], self.offsets[buffer]
        self.device[to : to + count] = self.twins[at : at + count]
        self.crossed += count

    def download(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        values = np.ndarray(shape, dtype, self.device.data, self.offsets[buffer]).copy()
        self.crossed += values.nbytes
        if buffer not in self.twin_offsets:
            return values
        twin = self.host(buffer, dtype, shape)
        twin[...] = values
        return twin

    def copy(self, target: Strip, source: Strip, count: int, pieces: int) -> None:
        to, of = (
            np.ndarray(
                (pieces, count),
                np.uint8,
                self.device.data,
                self.offsets[strip.buffer] + strip.offset,
                (strip.pitch, 1),
            )
            for strip in (target, source)
        )
        to[...] = of


class HostDevice(DeviceBackend):
    """The CPU provider behind everything else of a device. ``controls``: whether those too are read on the device."""

    name = "onnxruntime-host-device"
    controls = True

    def open_device(self) -> None:
        return None

    def session(self, graph: str) -> Any:
        return self.load(graph, self.options(), ["CPUExecutionProvider"])

    def reads_on_device(self, session: Any) -> dict[str, bool]:
        return {spec.name: self.controls or spec.name.startswith(STATES) for spec in session.get_inputs()}

    def buffers(self, sizes: dict[str, int], twins: Iterable[str]) -> TwoBlocks:
        return TwoBlocks(sizes, twins)


class ControlsOnTheHost(HostDevice):
    controls = False


@pytest.fixture(scope="module")
def packages(make_package: MakePackage, tiny_checkpoint: Path) -> dict[str, Path]:
    """A package a dialect."""
    return {dialect: make_package(tiny_checkpoint, dialect=dialect, max_batch=3) for dialect in DIALECTS}


def runtimes(package: Path, backend: type[HostDevice]) -> tuple[Runtime, Runtime]:
    """The package on the device and on the CPU."""
    opened = Package.open(package)
    on_cpu = Runtime.load(package, backend="onnxruntime")
    return Runtime(opened, backend(opened), on_cpu.codec), on_cpu


@pytest.mark.parametrize("backend", [HostDevice, ControlsOnTheHost])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_device_computes_what_the_cpu_computes(
    packages: dict[str, Path], dialect: str, backend: type[HostDevice]
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
    sessions = [runtime.session(2) for runtime in runtimes(packages[dialect], HostDevice)]
    for session in sessions:
        session.append([[3, 4, 5, 6], [9, 8]], LoopSettings(2))
    for state in sessions[0].manifest.states:
        np.testing.assert_array_equal(*(session.state.read(state.input) for session in sessions))


def test_only_controls_exit_probabilities_and_logits_cross(packages: dict[str, Path]) -> None:
    device, _ = runtimes(packages["onnxruntime"], HostDevice)
    session = device.session()
    session.append([[3, 4, 5]], LoopSettings(2))
    blocks = session.state.buffers
    before = blocks.crossed
    session.append([[6]], LoopSettings(4))
    logits = 4 * device.manifest.vocab_size
    controls = 8 + 8 + 8 + 4 * 1  # a token id, two lengths, and for each loop who is active
    assert blocks.crossed - before == logits + controls


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
