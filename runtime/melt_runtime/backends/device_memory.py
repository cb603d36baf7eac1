"""Named buffers in one block of device memory, with pinned staging buffers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError
from .bindings import rounded_up
from .cuda import Device
from .positions import StridedRegion

ALIGNMENT = 256  # of every buffer, as TensorRT requires


class DeviceBuffers:
    """Named buffers on a CUDA device. Any thread may call, one at a time.

    Methods named ``queue_`` only queue work on ``stream``; all others wait for it. ``sizes``: bytes by name.
    ``staged``: names with a staging buffer. ``whose``, ``parts``: who needs the memory and for what, for the error.
    Raises BackendError, before any allocation, with needed and free bytes.
    """

    kind = "cuda"  # ONNX Runtime's name of the device type

    def __init__(
        self, device: Device, sizes: dict[str, int], staged: Iterable[str], whose: str = "this batch", parts: str = ""
    ):
        self.device = device
        self._offsets, self.bytes = layout(sizes)
        self._host_offsets, pinned = layout({name: sizes[name] for name in staged})
        free = device.memory()[0]
        if self.bytes > free:
            raise BackendError(
                f"{whose} needs {self.bytes:,} bytes of device memory{parts}, {free:,} are free on {device.name}; "
                "use a smaller batch or export with a smaller --max-seq-len"
            )
        self.reading = False  # whether the device may still be reading staging buffers
        self.stream = device.stream()
        self._memory = device.allocate(self.bytes)
        try:
            self._pinned = device.pinned(pinned)
        except BackendError:
            self._memory.free()
            raise
        self._host = self._pinned.array()
        self._host[...] = 0
        self.stream.fill(self._memory.address, 0, self.bytes)
        self.stream.synchronize()

    def address(self, buffer: str) -> int:
        """Return a buffer's device address."""
        return self._memory.address + self._offsets[buffer]

    def host(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the front of a staging buffer, in pinned memory, always at the same address."""
        return np.ndarray(shape, dtype, self._host.data, self._host_offsets[buffer])

    def wait(self) -> None:
        """Wait for all queued work."""
        self.stream.synchronize()
        self.reading = False

    def queue_upload(self, buffer: str, count: int) -> None:
        """Queue a copy of the front of a staging buffer to the device."""
        self.stream.copy(self.address(buffer), self._pinned.address + self._host_offsets[buffer], count)
        self.reading = True

    def queue_download(self, buffer: str, count: int) -> None:
        """Queue a copy of the front of a buffer to its staging buffer."""
        self.stream.copy(self._pinned.address + self._host_offsets[buffer], self.address(buffer), count)

    def queue_copy(self, target: StridedRegion, source: StridedRegion, count: int, blocks: int) -> None:
        """Queue a copy of blocks on the device."""
        to, of = (self.address(region.buffer) + region.offset for region in (target, source))
        if blocks == 1:
            self.stream.copy(to, of, count)
            return
        self.stream.copy_blocks(to, target.pitch, of, source.pitch, count, blocks)

    def upload(self, buffer: str, count: int) -> None:
        """Copy the front of a staging buffer to the device."""
        self.device.use()
        self.queue_upload(buffer, count)
        self.wait()

    def download(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """Copy a buffer, from ``offset`` bytes on, into its staging buffer or a new array."""
        self.device.use()
        has_staging = buffer in self._host_offsets
        values = self.host(buffer, dtype, shape) if has_staging else np.empty(shape, dtype)
        self.stream.copy(values.ctypes.data, self.address(buffer) + offset, values.nbytes)
        self.wait()
        return values

    def copy(self, target: StridedRegion, source: StridedRegion, count: int, blocks: int) -> None:
        """Copy blocks on the device."""
        self.device.use()
        self.queue_copy(target, source, count, blocks)
        self.wait()

    def fetch(self, source: StridedRegion, count: int, blocks: int) -> NDArray[np.uint8]:
        """Copy blocks of a buffer to a host array (blocks, count)."""
        self.device.use()
        values = np.empty((blocks, count), np.uint8)
        begin = self.address(source.buffer) + source.offset
        self.stream.copy_blocks(values.ctypes.data, count, begin, source.pitch, count, blocks)
        self.wait()
        return values

    def store(self, target: StridedRegion, values: NDArray[np.uint8]) -> None:
        """Copy host blocks (blocks, count) into a buffer."""
        self.device.use()
        blocks, count = values.shape
        begin = self.address(target.buffer) + target.offset
        self.stream.copy_blocks(begin, target.pitch, values.ctypes.data, count, count, blocks)
        self.wait()


def layout(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Return each buffer's aligned offset in one block, and the block's bytes."""
    offsets, total = {}, 0
    for name, count in sizes.items():
        offsets[name] = total
        total += rounded_up(count, ALIGNMENT)
    return offsets, total
