"""Prefix cache: keeps cached keys and values of prompts, to restore them instead of running the tokens again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from threading import Lock
from typing import Any, Protocol

from numpy.typing import NDArray

from ..errors import ArgumentError
from ..package.reader import source_hash
from ..untrusted import whole_number
from .loop_driver import LoopDriver
from .settings import LoopSettings


class Prefixes(Protocol):
    """A store of prompt beginnings that requests share. ``bytes``: its size in host memory."""

    bytes: int

    def claim(self, driver: LoopDriver) -> None:
        """Bind the store to what runs in this driver. Raises ArgumentError if its contents come from something else."""

    def restore(self, driver: LoopDriver, slot: int, prompt: Sequence[int], settings: LoopSettings) -> int:
        """Restore the longest known beginning of a prompt into an empty slot. Return its number of tokens.

        It consists of whole chunks with these settings, and leaves at least the last token, which must run to give
        logits.
        """

    def keep(self, driver: LoopDriver, slot: int, prompt: Sequence[int], settings: LoopSettings) -> None:
        """Offer a prompt that has just run in a slot; its positions may be copied."""


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A stored chunk of a prompt; its key names the preceding chunk."""

    number: int
    positions: dict[str, NDArray[Any]]
    depth: tuple[int, ...]
    bytes: int


_Key = tuple[LoopSettings | int, tuple[int, ...]]  # settings or the preceding chunk's number; token ids


class PrefixCache:
    """A ``Prefixes`` store of at most ``max_bytes`` of host memory. The least recently used chunks are dropped first,
    and the end of a prompt before its beginning.

    Only whole chunks are restored, and only with equal loop settings, because the tokens of a chunk run their loops
    together: other chunks would give other results. Several schedulers and sessions may share a store, from any thread,
    but only of one package, backend and engine: others are refused with ArgumentError.
    """

    def __init__(self, max_bytes: int):
        whole_number("max_bytes", max_bytes)
        self.max_bytes, self.bytes = max_bytes, 0
        self._chunks: OrderedDict[_Key, _Chunk] = OrderedDict()  # a chunk comes after those that continue it
        self._numbers, self._lock = count(), Lock()
        self._owner: tuple[str, str] | None = None  # hash of graphs and weights, and what runs them

    def __len__(self) -> int:
        return len(self._chunks)

    def clear(self) -> None:
        """Drop all chunks and the binding to a package."""
        with self._lock:
            self._chunks.clear()
            self.bytes, self._owner = 0, None

    def claim(self, driver: LoopDriver) -> None:
        """Bind the store to what runs in this driver. Raises ArgumentError if it is bound to something else."""
        owner = source_hash(driver.manifest), driver.state.computed_by
        with self._lock:
            if self._owner not in (None, owner):
                raise ArgumentError(
                    "the prefix cache holds positions of another package, backend or engine; give each its own"
                )
            self._owner = owner

    def restore(self, driver: LoopDriver, slot: int, prompt: Sequence[int], settings: LoopSettings) -> int:
        """Restore the longest known beginning of a prompt into an empty slot. Return its number of tokens."""
        self.claim(driver)
        settings = _complete(driver, settings)
        with self._lock:
            path = self._path(prompt[: len(prompt) - 1], settings)
            self._touch(path)
            found = [self._chunks[key] for key in path]
        for chunk in found:
            driver.restore(slot, chunk.positions, chunk.depth)
        return sum(len(chunk.depth) for chunk in found)

    def keep(self, driver: LoopDriver, slot: int, prompt: Sequence[int], settings: LoopSettings) -> None:
        """Copy the whole chunks of a prompt that has just run in a slot, as far as there is room."""
        self.claim(driver)
        settings = _complete(driver, settings)
        size = settings.chunk or 1
        with self._lock:
            path = self._path(prompt, settings)
            self._touch(path)
            for start in range(len(path) * size, len(prompt) - size + 1, size):
                positions = driver.state.read_positions(slot, start, start + size, settings.loops)
                needed = sum(values.nbytes for values in positions.values())
                if not self._make_room(needed, set(path)):
                    break
                before = self._chunks[path[-1]].number if path else settings
                path.append((before, tuple(prompt[start : start + size])))
                depth = tuple(driver.cached.depth(slot)[start : start + size])
                self._chunks[path[-1]] = _Chunk(next(self._numbers), positions, depth, needed)
                self.bytes += needed
            self._touch(path)

    def _path(self, prompt: Sequence[int], settings: LoopSettings) -> list[_Key]:
        """Return the keys of a prompt's known chunks, from its first."""
        path: list[_Key] = []
        before: LoopSettings | int = settings
        size = settings.chunk or 1
        for start in range(0, len(prompt) - size + 1, size):
            key = (before, tuple(prompt[start : start + size]))
            if key not in self._chunks:
                break
            path.append(key)
            before = self._chunks[key].number
        return path

    def _touch(self, path: Sequence[_Key]) -> None:
        """Mark chunks as used, the first one last, so that none is dropped before those that continue it."""
        for key in reversed(path):
            self._chunks.move_to_end(key)

    def _make_room(self, needed: int, held: set[_Key]) -> bool:
        """Drop the least recently used chunks, but none of ``held``. Return whether there is room."""
        while self.bytes + needed > self.max_bytes:
            key = next(iter(self._chunks), None)
            if key is None or key in held:
                return False
            self.bytes -= self._chunks.pop(key).bytes
        return True


def _complete(driver: LoopDriver, settings: LoopSettings) -> LoopSettings:
    """Fill in the package's chunk size."""
    return replace(settings, chunk=settings.chunk or driver.manifest.chunk)
