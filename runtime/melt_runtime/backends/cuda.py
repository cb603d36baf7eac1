"""A CUDA device as the backends need it: memory, one stream, events and captured graphs; on cuda-bindings alone.

Every refusal is a BackendError with CUDA's own name and text. Nothing is imported before a device is opened.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, BackendError


def open_device(index: int = 0) -> Device:
    """The device of that index. Raises ArgumentError, BackendError: no package, no driver, one too old, no device."""
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ArgumentError(f"device is {index!r}; devices are counted from 0")
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError) as error:
        raise BackendError(
            f"cuda-bindings is not installed ({' '.join(str(error).split())}); "
            "install it with: pip install 'melt-export[tensorrt-rtx]' or 'melt-export[tensorrt]'"
        ) from error
    return Device(runtime, index)


class Device:
    """A CUDA device: ``name``, ``capability`` ("8.9"), and ``driver``: the newest CUDA its driver knows ("13.0")."""

    def __init__(self, api: Any, index: int):
        self.api, self.index = api, index
        status, count = api.cudaGetDeviceCount()
        if _name(api, status) == "cudaErrorInsufficientDriver":
            driver, built = (checked(api, call) for call in ("cudaDriverGetVersion", "cudaRuntimeGetVersion"))
            why = f"{_name(api, status)}: {_text(api, status)}"
            if driver == 0:
                raise BackendError(f"there is no NVIDIA driver on this machine ({why})")
            raise BackendError(
                f"the NVIDIA driver is too old: it knows CUDA {_version(driver)}, cuda-bindings here is for "
                f"{_version(built)} ({why}); update the driver or install an older cuda-bindings"
            )
        if _name(api, status) not in ("cudaSuccess", "cudaErrorNoDevice"):
            raise BackendError(f"CUDA cannot start: {_name(api, status)}: {_text(api, status)}")
        count = count or 0
        if index >= count:
            there = f"it has {count}, counted from 0" if count else "it has none"
            raise BackendError(f"there is no CUDA device {index} on this machine: {there}")
        self.use()
        self.name = checked(api, "cudaGetDeviceProperties", index).name.split(b"\0")[0].decode(errors="replace")
        attribute = api.cudaDeviceAttr
        self.capability = ".".join(
            str(checked(api, "cudaDeviceGetAttribute", which, index))
            for which in (attribute.cudaDevAttrComputeCapabilityMajor, attribute.cudaDevAttrComputeCapabilityMinor)
        )
        self.driver = _version(checked(api, "cudaDriverGetVersion"))

    def use(self) -> None:
        """Makes it the calling thread's device."""
        checked(self.api, "cudaSetDevice", self.index)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        self.use()
        free, total = checked(self.api, "cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, count: int) -> Memory:
        """Device memory, aligned to 256 bytes. Raises BackendError with what was wanted and what is free."""
        self.use()
        try:
            address = int(checked(self.api, "cudaMalloc", max(count, 1)))
        except BackendError as error:
            raise BackendError(f"{count:,} bytes of device memory, {self.memory()[0]:,} are free: {error}") from error
        return Memory(self.api, address, count, "cudaFree")

    def pinned(self, count: int) -> Memory:
        """Host memory that the device reads and writes by itself. Raises BackendError."""
        self.use()
        try:
            address = int(checked(self.api, "cudaMallocHost", max(count, 1)))
        except BackendError as error:
            raise BackendError(f"{count:,} bytes of pinned host memory: {error}") from error
        return Memory(self.api, address, count, "cudaFreeHost")

    def stream(self) -> Stream:
        """A stream of its own, that waits for no other."""
        self.use()
        return Stream(self.api, checked(self.api, "cudaStreamCreateWithFlags", self.api.cudaStreamNonBlocking))


class Memory:
    """An allocation, freed when it is dropped."""

    def __init__(self, api: Any, address: int, count: int, release: str):
        self.address, self.bytes = address, count
        self._api, self._release = api, release

    def array(self) -> NDArray[np.uint8]:
        """Pinned memory as bytes that numpy reads and writes, and that it keeps from being dropped."""
        return host_array(self.address, self.bytes, self)

    def free(self) -> None:
        """Gives it back; a second call does nothing."""
        if self.address:
            getattr(self._api, self._release)(self.address)
            self.address = 0

    def __del__(self) -> None:
        self.free()


class Stream:
    """Work in order, one after the other, while the host goes on."""

    def __init__(self, api: Any, stream: Any):
        self.api, self.stream = api, stream
        self.handle = int(stream)  # what TensorRT takes

    def copy(self, target: int, source: int, count: int) -> None:
        """Copies bytes between addresses of the device or of pinned memory."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDefault
        checked(self.api, "cudaMemcpyAsync", target, source, count, kind, self.stream)

    def copy_pieces(
        self, target: int, target_pitch: int, source: int, source_pitch: int, count: int, pieces: int
    ) -> None:
        """Copies ``pieces`` pieces of ``count`` bytes; a pitch is from the start of one to the start of the next."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDefault
        checked(
            self.api,
            "cudaMemcpy2DAsync",
            *(target, target_pitch, source, source_pitch, count, pieces, kind, self.stream),
        )

    def fill(self, target: int, value: int, count: int) -> None:
        """Sets bytes of device memory."""
        checked(self.api, "cudaMemsetAsync", target, value, count, self.stream)

    def synchronize(self) -> None:
        """Waits until all work is done. Raises BackendError for what failed on the way."""
        checked(self.api, "cudaStreamSynchronize", self.stream)

    def record(self) -> Event:
        """An event here: done when all work before it is."""
        event = checked(self.api, "cudaEventCreate")
        checked(self.api, "cudaEventRecord", event, self.stream)
        return Event(self.api, event)

    def capture(self, work: Callable[[], None]) -> Graph:
        """What ``work`` puts on the stream, as a graph; nothing of it runs. Raises BackendError."""
        checked(
            self.api,
            "cudaStreamBeginCapture",
            *(self.stream, self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal),
        )
        try:
            work()
        except BaseException:
            _, graph = self.api.cudaStreamEndCapture(self.stream)
            if graph is not None and int(graph):
                self.api.cudaGraphDestroy(graph)
            raise
        graph = checked(self.api, "cudaStreamEndCapture", self.stream)
        try:
            made = checked(self.api, "cudaGraphInstantiate", graph, 0)
        finally:
            self.api.cudaGraphDestroy(graph)
        return Graph(self.api, made, self.stream)

    def __del__(self) -> None:
        self.api.cudaStreamDestroy(self.stream)


class Event:
    """A moment on a stream."""

    def __init__(self, api: Any, event: Any):
        self._api, self._event = api, event

    def wait(self) -> None:
        """Waits for it on the host."""
        checked(self._api, "cudaEventSynchronize", self._event)

    def since(self, earlier: Event) -> float:
        """Milliseconds from an earlier event to this one, both of which are over."""
        return float(checked(self._api, "cudaEventElapsedTime", earlier._event, self._event))

    def __del__(self) -> None:
        self._api.cudaEventDestroy(self._event)


class Graph:
    """Captured work, instantiated: one launch runs all of it."""

    def __init__(self, api: Any, graph: Any, stream: Any):
        self._api, self._graph, self._stream = api, graph, stream

    def launch(self) -> None:
        """Puts the whole of it on the stream that it was captured from."""
        checked(self._api, "cudaGraphLaunch", self._graph, self._stream)

    def __del__(self) -> None:
        self._api.cudaGraphExecDestroy(self._graph)


def host_array(address: int, count: int, owner: object = None) -> NDArray[np.uint8]:
    """Bytes at an address of the host's memory; as long as the array or a view of it lives, so does the owner."""
    block: Any = (ctypes.c_uint8 * count).from_address(address)
    block.owner = owner
    return np.ctypeslib.as_array(block)


def checked(api: Any, call: str, *arguments: Any) -> Any:
    """Calls a function of the CUDA runtime. Returns its result, or a tuple of several; raises BackendError."""
    status, *values = getattr(api, call)(*arguments)
    if int(status):
        raise BackendError(f"{call} failed with {_name(api, status)}: {_text(api, status)}")
    return values[0] if len(values) == 1 else tuple(values)


def _name(api: Any, status: Any) -> str:
    return str(api.cudaGetErrorName(status)[1].decode())


def _text(api: Any, status: Any) -> str:
    return str(api.cudaGetErrorString(status)[1].decode())


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
