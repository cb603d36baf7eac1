"""The CUDA calls that the backends need, on cuda-bindings: memory, streams, events, captured graphs.

Every failure is a BackendError with CUDA's name and text. Nothing is imported before a device is opened.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, BackendError


def open_device(index: int = 0) -> Device:
    """Open a device. Raises ArgumentError; BackendError: no cuda-bindings, no driver, driver too old, no such
    device."""
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
    """A CUDA device. ``capability``: "8.9". ``driver``: the newest CUDA version that its driver supports ("13.0")."""

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
        """Make this the calling thread's device."""
        checked(self.api, "cudaSetDevice", self.index)

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes."""
        self.use()
        free, total = checked(self.api, "cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, count: int) -> Allocation:
        """Allocate device memory, aligned to 256 bytes. Raises BackendError with wanted and free bytes."""
        self.use()
        try:
            address = int(checked(self.api, "cudaMalloc", max(count, 1)))
        except BackendError as error:
            raise BackendError(f"{count:,} bytes of device memory, {self.memory()[0]:,} are free: {error}") from error
        return Allocation(self.api, address, count, "cudaFree")

    def pinned(self, count: int) -> Allocation:
        """Allocate pinned host memory. Raises BackendError."""
        self.use()
        try:
            address = int(checked(self.api, "cudaMallocHost", max(count, 1)))
        except BackendError as error:
            raise BackendError(f"{count:,} bytes of pinned host memory: {error}") from error
        return Allocation(self.api, address, count, "cudaFreeHost")

    def stream(self) -> Stream:
        """Make a stream that does not synchronise with others."""
        self.use()
        return Stream(self.api, checked(self.api, "cudaStreamCreateWithFlags", self.api.cudaStreamNonBlocking))


class Allocation:
    """Allocated memory, freed when it is dropped."""

    def __init__(self, api: Any, address: int, count: int, release: str):
        self.address, self.bytes = address, count
        self._api, self._release = api, release

    def array(self) -> NDArray[np.uint8]:
        """Return pinned memory as a byte array, which keeps it alive."""
        return host_array(self.address, self.bytes, self)

    def free(self) -> None:
        """Free the memory; further calls do nothing."""
        if self.address:
            getattr(self._api, self._release)(self.address)
            self.address = 0

    def __del__(self) -> None:
        self.free()


class Stream:
    """A queue of device work that runs in order while the host goes on."""

    def __init__(self, api: Any, stream: Any):
        self.api, self.stream = api, stream
        self.handle = int(stream)  # as TensorRT takes it

    def copy(self, target: int, source: int, count: int) -> None:
        """Copy bytes between addresses of device or pinned memory."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDefault
        checked(self.api, "cudaMemcpyAsync", target, source, count, kind, self.stream)

    def copy_blocks(
        self, target: int, target_pitch: int, source: int, source_pitch: int, count: int, blocks: int
    ) -> None:
        """Copy ``blocks`` blocks of ``count`` bytes; a pitch is the distance between starts."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDefault
        checked(
            self.api,
            "cudaMemcpy2DAsync",
            *(target, target_pitch, source, source_pitch, count, blocks, kind, self.stream),
        )

    def fill(self, target: int, value: int, count: int) -> None:
        """Fill bytes of device memory."""
        checked(self.api, "cudaMemsetAsync", target, value, count, self.stream)

    def synchronize(self) -> None:
        """Wait until all work is done. Raises BackendError for its failures."""
        checked(self.api, "cudaStreamSynchronize", self.stream)

    def record(self) -> Event:
        """Record an event after all work queued so far."""
        event = checked(self.api, "cudaEventCreate")
        checked(self.api, "cudaEventRecord", event, self.stream)
        return Event(self.api, event)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Capture the work that ``work`` queues as a graph, without running it. Raises BackendError."""
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
    """A point in a stream."""

    def __init__(self, api: Any, event: Any):
        self._api, self._event = api, event

    def wait(self) -> None:
        """Wait on the host for the event."""
        checked(self._api, "cudaEventSynchronize", self._event)

    def since(self, earlier: Event) -> float:
        """Return the milliseconds since an earlier event; both must have completed."""
        return float(checked(self._api, "cudaEventElapsedTime", earlier._event, self._event))

    def __del__(self) -> None:
        self._api.cudaEventDestroy(self._event)


class Graph:
    """A captured and instantiated CUDA graph; one launch runs all its work."""

    def __init__(self, api: Any, graph: Any, stream: Any):
        self._api, self._graph, self._stream = api, graph, stream

    def launch(self) -> None:
        """Queue the graph on the stream that it was captured from."""
        checked(self._api, "cudaGraphLaunch", self._graph, self._stream)

    def __del__(self) -> None:
        self._api.cudaGraphExecDestroy(self._graph)


def host_array(address: int, count: int, owner: object = None) -> NDArray[np.uint8]:
    """Return bytes at a host address as an array that keeps ``owner`` alive."""
    block: Any = (ctypes.c_uint8 * count).from_address(address)
    block.owner = owner
    return np.ctypeslib.as_array(block)


def checked(api: Any, call: str, *arguments: Any) -> Any:
    """Call a CUDA runtime function. Return its result, or a tuple of several. Raises BackendError."""
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
