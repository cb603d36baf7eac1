"""Refusals of the device layer: what CUDA says, in one sentence. Its API is a stand-in, but for one test."""

from __future__ import annotations

import sys
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from device_double import add_plans
from melt_runtime import ArgumentError, BackendError, Runtime
from melt_runtime.backends.cuda import Allocation, Device, Stream, host_array, open_device


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class Api:
    """Answers as cuda.bindings.runtime does: a status, then results. ``answers`` replaces some."""

    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1

    def __init__(self, **answers: tuple[Any, ...]):
        self.answers = {
            "cudaGetDeviceCount": (Status(0), 1),
            "cudaDriverGetVersion": (Status(0), 13000),
            "cudaRuntimeGetVersion": (Status(0), 13050),
            "cudaMemGetInfo": (Status(0), 1000, 2000),
            "cudaGetDeviceProperties": (Status(0), SimpleNamespace(name=b"A card\0\0")),
            **answers,
        }
        self.calls: list[str] = []

    def __getattr__(self, call: str) -> Any:
        def answer(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(call)
            if call == "cudaGetErrorName":
                return Status(0), Status(int(arguments[0])).name.encode()
            if call == "cudaGetErrorString":
                return Status(0), f"text of {int(arguments[0])}".encode()
            if call == "cudaDeviceGetAttribute":
                return Status(0), {75: 8, 76: 9}[arguments[0]]
            return self.answers.get(call, (Status(0),))

        return answer


def driverless() -> bool:
    """Whether cuda-bindings is here and no driver is."""
    try:
        open_device()
    except BackendError as error:
        return "there is no NVIDIA driver" in str(error)
    return False


def test_without_a_driver_the_real_library_says_so(tiny_package: Path, package_copy: Path) -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if not driverless():
        pytest.skip("there is a driver here")
    add_plans(package_copy)
    expected = r"there is no NVIDIA driver on this machine \(cudaErrorInsufficientDriver: CUDA driver version is insuff"
    with pytest.raises(BackendError, match=expected):
        Runtime.load(package_copy, backend="tensorrt")


def test_a_driver_that_is_too_old_is_told_from_none() -> None:
    status = Status.cudaErrorInsufficientDriver
    api = Api(cudaGetDeviceCount=(status, None), cudaDriverGetVersion=(Status(0), 12040))
    with pytest.raises(BackendError, match=r"too old: it knows CUDA 12\.4, cuda-bindings here is for 13\.5 \("):
        Device(api, 0)


def test_a_device_that_is_not_there_is_refused_with_how_many_are() -> None:
    with pytest.raises(BackendError, match=r"no CUDA device 3 on this machine: it has 1, counted from 0"):
        Device(Api(), 3)
    with pytest.raises(BackendError, match=r"no CUDA device 0 on this machine: it has none"):
        Device(Api(cudaGetDeviceCount=(Status.cudaErrorNoDevice, None)), 0)


@pytest.mark.parametrize("index", [-1, 1.0, True, "0"])
def test_a_device_is_chosen_by_a_whole_number_from_0(index: Any) -> None:
    with pytest.raises(ArgumentError, match="devices are counted from 0"):
        open_device(index)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r"cuda-bindings is not installed .*pip install 'melt-export\[tensorrt"):
        open_device()


def test_a_device_knows_its_name_capability_and_driver() -> None:
    device = Device(Api(), 0)
    assert (device.name, device.capability, device.driver, device.memory()) == ("A card", "8.9", "13.0", (1000, 2000))


def test_a_failed_allocation_says_what_was_wanted_and_what_is_free() -> None:
    device = Device(Api(cudaMalloc=(Status.cudaErrorMemoryAllocation, None)), 0)
    expected = r"4,096 bytes of device memory, 1,000 are free: cudaMalloc failed with cudaErrorMemoryAllocation: text"
    with pytest.raises(BackendError, match=expected):
        device.allocate(4096)


def test_an_error_carries_cudas_own_name_and_text() -> None:
    stream = Stream(Api(cudaStreamSynchronize=(Status.cudaErrorIllegalAddress,)), 1)
    with pytest.raises(BackendError, match="cudaStreamSynchronize failed with cudaErrorIllegalAddress: text of 700"):
        stream.synchronize()


def test_a_capture_that_fails_is_ended_and_its_graph_destroyed() -> None:
    api = Api(cudaStreamEndCapture=(Status(0), 5))

    def work() -> None:
        raise BackendError("inside")

    with pytest.raises(BackendError, match="inside"):
        Stream(api, 1).capture(work)
    assert api.calls[-3:] == ["cudaStreamEndCapture", "cudaGraphDestroy", "cudaStreamDestroy"]


def test_memory_is_freed_once() -> None:
    api = Api()
    memory = Allocation(api, 1 << 20, 8, "cudaFree")
    memory.free()
    del memory
    assert api.calls == ["cudaFree"]


def test_an_array_over_pinned_memory_keeps_it_alive() -> None:
    api, block = Api(), np.zeros(16, np.uint8)
    array = Allocation(api, block.ctypes.data, 16, "cudaFreeHost").array()[4:]
    array[0] = 7
    assert block[4] == 7
    assert api.calls == []
    del array
    assert api.calls == ["cudaFreeHost"]
    assert host_array(block.ctypes.data, 16)[4] == 7
