"""Named buffers in one block of device memory, with pinned twins of those that the host touches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError
from .buffers import Strip
from .cuda import Device

_ALIGNMENT = 256


class DeviceBuffers:
    """Buffers on a CUDA device. Every method waits for what it started, so that any other stream may go on;
    it may be called from any thread, one at a time.

    sizes: bytes by name. twins: the names that the host writes or reads often. Raises BackendError, before anything is
    allocated, with what is needed and what is free.
    """

    kind = "cuda"

    def __init__(self, device: Device, sizes: dict[str, int], twins: Iterable[str]):
        self.device, self.index = device, device.index
        self._offsets, total = layout(sizes)
        self._host_offsets, pinned = layout({name: sizes[name] for name in twins})
        free = device.memory()[0]
        if total > free:
            raise BackendError(
                f"this batch needs {total:,} bytes of device memory, {free:,} are free on {device.name}; "
                "use a smaller batch or export with a smaller --max-seq-len"
            )
        self.stream = device.stream()
        self._memory = device.allocate(total)
        try:
            self._pinned = device.pinned(pinned)
        except BackendError:
            self._memory.free()
            raise
        self._host = self._pinned.array()
        self._host[...] = 0
        self.stream.fill(self._memory.address, 0, total)
        self.stream.synchronize()

    def address(self, buffer: str) -> int:
        """Where a buffer lies on the device."""
        return self._memory.address + self._offsets[buffer]

    def host(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The front of a twin, in pinned memory."""
        return np.ndarray(shape, dtype, self._host.data, self._host_offsets[buffer])

    def upload(self, buffer: str, count: int) -> None:
        """The front of a twin to the device."""
        self.device.use()
        self.stream.copy(self.address(buffer), self._pinned.address + self._host_offsets[buffer], count)
        self.stream.synchronize()

    def download(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """A buffer from ``offset`` bytes on: into its twin, or for one without into a new array."""
        self.device.use()
        twin = buffer in self._host_offsets
        values = self.host(buffer, dtype, shape) if twin else np.empty(shape, dtype)
        self.stream.copy(values.ctypes.data, self.address(buffer) + offset, values.nbytes)
        self.stream.synchronize()
        return values

    def copy(self, target: Strip, source: Strip, count: int, pieces: int) -> None:
        """One strided copy on the device."""
        self.device.use()
        to, of = (self.address(strip.buffer) + strip.offset for strip in (target, source))
        self.stream.copy_pieces(to, target.pitch, of, source.pitch, count, pieces)
        self.stream.synchronize()

    def fetch(self, source: Strip, count: int, pieces: int) -> NDArray[np.uint8]:
        """Pieces of a buffer (pieces, count), copied to the host."""
        self.device.use()
        values = np.empty((pieces, count), np.uint8)
        begin = self.address(source.buffer) + source.offset
        self.stream.copy_pieces(values.ctypes.data, count, begin, source.pitch, count, pieces)
        self.stream.synchronize()
        return values

    def store(self, target: Strip, values: NDArray[np.uint8]) -> None:
        """Pieces (pieces, count) of the host into a buffer."""
        self.device.use()
        pieces, count = values.shape
        begin = self.address(target.buffer) + target.offset
        self.stream.copy_pieces(begin, target.pitch, values.ctypes.data, count, count, pieces)
        self.stream.synchronize()


def layout(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Where buffers lie in one block, each aligned, and the bytes of the block."""
    offsets, total = {}, 0
    for name, count in sizes.items():
        offsets[name] = total
        total += -(-count // _ALIGNMENT) * _ALIGNMENT
    return offsets, total
