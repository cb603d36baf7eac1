"""The cached positions of a batch's sequences: read, written, moved and laid out anew, wherever the buffers are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..package.manifest import Manifest
from ..package.specs import ITEM_BYTES, StateSpec
from .bindings import buffer_name, cache_buffers, rows_name
from .control import LoopControl


@dataclass(frozen=True)
class StridedRegion:
    """Blocks of equal size at equal distances in a buffer, in bytes: the offset of the first, and the pitch between
    starts."""

    buffer: str
    offset: int
    pitch: int


class CachedPositions(ABC):
    """The caches of ``batch`` sequences. ``places``: where each lies, by name: a buffer, and bytes from its start."""

    manifest: Manifest
    batch: int
    places: dict[str, tuple[str, int]]
    read_only: list[StateSpec]  # caches that a graph does not write
    loops_run: int  # loops of the current chunk
    alignment = 1  # bytes to a multiple of which bound caches begin

    @abstractmethod
    def copy(self, target: StridedRegion, source: StridedRegion, count: int, blocks: int) -> None:
        """Copy ``blocks`` blocks of ``count`` bytes from one buffer to another."""

    @abstractmethod
    def fetch(self, source: StridedRegion, count: int, blocks: int) -> NDArray[np.uint8]:
        """Return blocks of ``count`` bytes of a buffer as a host array (blocks, count)."""

    @abstractmethod
    def store(self, target: StridedRegion, values: NDArray[np.uint8]) -> None:
        """Write contiguous host data (blocks, count) into a buffer. The array may be reused afterwards."""

    def commit(self, control: LoopControl, stage: str | None = None, loops: Sequence[int] | None = None) -> None:
        """Copy the chunk's positions into read-only caches; in other dialects the graph has written them.

        ``stage``: whose caches; None: those of all. ``loops``: of caches per loop, whose; None: of all that ran.
        """
        for state in self.read_only:
            if stage in (None, state.stage):
                every = range(self.loops_run) if loops is None else loops
                for loop in every if state.by_loop else (0,):
                    self._commit(control, state, loop)

    def _commit(self, control: LoopControl, state: StateSpec, loop: int) -> None:
        """Copy a chunk's positions into one read-only cache."""
        heads, positions, size = (int(dim) for dim in state.bound_shape[1:])
        width, step = control.active.shape[1], size * ITEM_BYTES[state.dtype]
        cache, first = self.places[buffer_name(state, 0, loop)]
        rows, given = self.places[rows_name(state, loop)]
        counts = zip(control.lengths.tolist(), control.chunk_lengths.tolist(), strict=True)
        for slot, (at, count) in enumerate(counts):
            if count:
                target = StridedRegion(cache, first + (slot * heads * positions + at) * step, positions * step)
                source = StridedRegion(rows, given + slot * heads * width * step, width * step)
                self.copy(target, source, count * step, heads)

    def read_positions(self, slot: int, start: int, stop: int, loops: int | None = None) -> dict[str, NDArray[Any]]:
        """Return a copy of cache positions ``start`` to ``stop - 1`` of a sequence, by buffer (kv_heads, positions,
        head_dim).

        bfloat16 is returned as bits. ``loops``: of a LoopLM, only the caches of this many loops. Call it between
        chunks. Raises ArgumentError for positions that do not exist.
        """
        found = {}
        for name, state in cache_buffers(self.manifest, loops).items():
            region, heads, size = self._region_of(name, state, slot, start, stop)
            dtype = host_dtype(state.dtype)
            values = self.fetch(region, (stop - start) * size * dtype.itemsize, heads)
            found[name] = values.view(dtype).reshape(heads, stop - start, size)
        return found

    def write_positions(self, slot: int, start: int, positions: Mapping[str, NDArray[Any]]) -> None:
        """Write what ``read_positions`` returned into a sequence's caches from position ``start`` on.

        Raises ArgumentError, before any write, for names, types or shapes that are not this state's.
        """
        regions, known = [], cache_buffers(self.manifest)
        for name, values in positions.items():
            if name not in known or values.ndim != 3 or values.dtype != host_dtype(known[name].dtype):
                raise ArgumentError(f"{name!r} as {values.dtype} with {values.ndim} axes is no cache of this state")
            region, heads, size = self._region_of(name, known[name], slot, start, start + values.shape[1])
            if values.shape[::2] != (heads, size):
                raise ArgumentError(f"{name} has the shape {values.shape}, not ({heads}, positions, {size})")
            regions.append((region, np.ascontiguousarray(values).reshape(heads, -1).view(np.uint8)))
        for region, values in regions:
            self.store(region, values)

    def _region_of(
        self, buffer: str, state: StateSpec, slot: int, start: int, stop: int
    ) -> tuple[StridedRegion, int, int]:
        """Return the region of a sequence's positions, a block per head, with the number of heads and the head size."""
        heads, positions, size = (int(dim) for dim in state.bound_shape[1:])
        if not (0 <= slot < self.batch and 0 <= start < stop <= positions):
            raise ArgumentError(
                f"positions {start} to {stop - 1} of slot {slot} are not among the {positions} positions of "
                f"{self.batch} slots"
            )
        step = size * ITEM_BYTES[state.dtype]
        block, offset = self.places[buffer]
        return StridedRegion(block, offset + (slot * heads * positions + start) * step, positions * step), heads, size

    def move(self, slot: int, to: int, length: int) -> None:
        """Copy the first ``length`` cached positions of a sequence to another's place."""
        for name, state in cache_buffers(self.manifest).items():
            self._move(name, state, slot, self, to, length)

    def repack(self, target: CachedPositions, lengths: Sequence[int]) -> None:
        """Move the cached positions of the first sequences to where another state over the same memory has them.

        ``lengths``: positions per sequence to keep; all others are lost.
        """
        caches = cache_buffers(self.manifest).items()
        moves = [(name, state, slot) for name, state in caches for slot in range(len(lengths))]
        # In this order no position is written over before it was moved: the caches of a LoopLM's loops lie in one
        # buffer, in ascending order, nearer to each other where there are fewer sequences.
        for name, state, slot in moves if target.batch < self.batch else reversed(moves):
            self._move(name, state, slot, target, slot, lengths[slot])

    def _move(self, name: str, state: StateSpec, slot: int, target: CachedPositions, to: int, length: int) -> None:
        """Copy the first ``length`` positions of a sequence in one cache to a place in another state's."""
        if length:
            source, heads, size = self._region_of(name, state, slot, 0, length)
            region, _, _ = target._region_of(name, state, to, 0, length)
            if region != source:
                self.copy(region, source, length * size * ITEM_BYTES[state.dtype], heads)


def host_dtype(dtype: str) -> np.dtype[Any]:
    """Return the NumPy type of a tensor type; for bfloat16, which NumPy lacks, that of its bits."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
