"""Beginnings of prompts that were run before: their cache rows are kept, and put back instead of being run again."""

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
    """Prompts that were run before, kept to be put back: the beginnings that requests share. ``bytes``: what they take
    of the host's memory."""

    bytes: int

    def claim(self, driver: LoopDriver) -> None:
        """Who will use it says so first. Raises ArgumentError if what is kept was run by something else."""

    def restore(self, driver: LoopDriver, slot: int, prompt: Sequence[int], settings: LoopSettings) -> int:
        """Puts the longest known beginning of a prompt into an empty slot: its cache rows, ``lengths`` and ``depth``.

        Returns how many tokens that is: whole chunks of these settings, and fewer than the prompt has, for its last
        token must run to give logits.
        """

    def keep(self, driver: LoopDriver, slot: int, prompt: Sequence[int], settings: LoopSettings) -> None:
        """A prompt has just run in a slot: its rows may be copied."""


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A whole chunk of a prompt: its first, or behind the chunk that its key names."""

    number: int
    rows: dict[str, NDArray[Any]]
    depth: tuple[int, ...]
    bytes: int


_Key = tuple[LoopSettings | int, tuple[int, ...]]  # how deep its prompt runs, or the chunk before it; its tokens


class PrefixCache:
    """Keeps the rows of prompts, chunk by chunk, in at most ``max_bytes`` of the host's memory; those that were not
    used for longest go first, the ends of prompts before their beginnings.

    Only whole chunks are put back, and only for the same loop settings: the tokens of a chunk run their loops together,
    so that a beginning cut elsewhere would mean something else. It fulfils ``Prefixes``, for the scheduler and for
    sessions, and may serve several of them at once, and from any thread. It belongs to what used it first: another
    package, backend or engine, whose rows would be others, is refused with an ArgumentError.
    """

    def __init__(self, max_bytes: int):
        whole_number("max_bytes", max_bytes)
        self.max_bytes, self.bytes = max_bytes, 0
        self._chunks: OrderedDict[_Key, _Chunk] = OrderedDict()  # the next to go first; always behind its descendants
        self._numbers, self._lock = count(), Lock()
        self._owner: tuple[str, str] | None = None  # graphs and weights, and what runs them

    def __len__(self) -> int:
        return len(self._chunks)

    def clear(self) -> None:
        """Forgets everything, and to what it belonged."""
        with self._lock:
            self._chunks.clear()
            self.bytes, self._owner = 0, None

    def claim(self, driver: LoopDriver) -> None:
        """From now on it belongs to what runs in this driver. Raises ArgumentError if it belongs to something else."""
        owner = source_hash(driver.manifest), driver.state.computed_by
        with self._lock:
            if self._owner not in (None, owner):
                raise ArgumentError(
                    "the prefix store holds rows of another package, backend or engine; give each a store of its own"
                )
            self._owner = owner

    def restore(self, driver: LoopDriver, slot: int, prompt: Sequence[int], settings: LoopSettings) -> int:
        """Puts the longest known beginning of a prompt into an empty slot, and returns how many tokens that is: whole
        chunks, and fewer than the prompt has."""
        self.claim(driver)
        settings = _complete(driver, settings)
        with self._lock:
            path = self._path(prompt[: len(prompt) - 1], settings)
            self._touch(path)
            found = [self._chunks[key] for key in path]
        for chunk in found:
            driver.restore(slot, chunk.rows, chunk.depth)
        return sum(len(chunk.depth) for chunk in found)

    def keep(self, driver: LoopDriver, slot: int, prompt: Sequence[int], settings: LoopSettings) -> None:
        """Copies the rows of a prompt that has just run in a slot: its whole chunks, as far as there is room."""
        self.claim(driver)
        settings = _complete(driver, settings)
        size = settings.chunk or 1
        with self._lock:
            path = self._path(prompt, settings)
            self._touch(path)
            for start in range(len(path) * size, len(prompt) - size + 1, size):
                rows = driver.state.rows(slot, start, start + size, settings.loops)
                needed = sum(values.nbytes for values in rows.values())
                if not self._make_room(needed, set(path)):
                    break
                before = self._chunks[path[-1]].number if path else settings
                path.append((before, tuple(prompt[start : start + size])))
                depth = tuple(driver.depth[slot][start : start + size])
                self._chunks[path[-1]] = _Chunk(next(self._numbers), rows, depth, needed)
                self.bytes += needed
            self._touch(path)

    def _path(self, prompt: Sequence[int], settings: LoopSettings) -> list[_Key]:
        """The chunks that are known of a prompt, from its first."""
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
        """They were used now, the first of them last, so that none goes before what hangs on it."""
        for key in reversed(path):
            self._chunks.move_to_end(key)

    def _make_room(self, needed: int, held: set[_Key]) -> bool:
        """Drops what was not used for longest, but nothing of ``held``; whether there is room now."""
        while self.bytes + needed > self.max_bytes:
            key = next(iter(self._chunks), None)
            if key is None or key in held:
                return False
            self.bytes -= self._chunks.pop(key).bytes
        return True


def _complete(driver: LoopDriver, settings: LoopSettings) -> LoopSettings:
    """The settings with the chunk named."""
    return replace(settings, chunk=settings.chunk or driver.manifest.chunk)
