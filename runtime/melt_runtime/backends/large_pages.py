"""Large pages for a model's weights, so that the processor looks up fewer addresses while it reads them.

A token reads all weights once. In pages of 4 KB the processor looks an address up every 4 KB, far more of them than it
remembers; in pages of 2 MB they hardly cost anything. Linux gives them only where it is asked (its setting "madvise",
which is usual), and ONNX Runtime does not ask.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import groupby
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from ..machine import available_memory

_Range = tuple[int, int]  # from the first address to the one behind the last
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MAPS = Path("/proc/self/maps")
# A private, writable mapping of no file; malloc's heap has a name.
_ANONYMOUS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 +(?:\[heap\])?$", re.MULTILINE)
_HUGEPAGE, _COLLAPSE = 14, 25  # what madvise is asked for, in Linux's numbers; the second since 6.1
_LEAST_FREE = 256 << 20  # bytes
_TRIES = 3  # of a call that finds pages busy; it moves the others
_AT_ONCE = 16  # large pages per call, after which other threads may change the memory's mappings


class NewMemory:
    """The memory that this process allocates after this object is made."""

    def __init__(self) -> None:
        self._before = _anonymous()

    def in_large_pages(self) -> Thread | None:
        """Ask Linux to put it into large pages where all of it is in use, and return the thread in which it copies.

        None where there is nothing to do, or Linux is not asked: on other systems, if it is set to "never", or if
        memory is so short that it would have to make room. Nothing waits for the thread: the memory can be used
        meanwhile, and freed. The process needs no more memory than before.
        """
        size = _page_size()
        if size is None or (available_memory() or 0) < _LEAST_FREE:
            return None
        ranges = list(_used(_without(_anonymous(), self._before), size))
        if not ranges:
            return None
        thread = Thread(target=_collapse, args=(ranges, size), name="melt-large-pages", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the process may start no more threads
            return None
        return thread


def _page_size() -> int | None:
    """Return the bytes of a large page; None where there are none."""
    if sys.platform != "linux":
        return None
    try:
        return None if "[never]" in _SETTING.read_text(encoding="ascii") else int(_SIZE.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _anonymous() -> list[_Range]:
    """Return the mappings that malloc takes its memory from, in the order of their addresses."""
    try:
        maps = _MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [(int(first, 16), int(end, 16)) for first, end in _ANONYMOUS.findall(maps)]


def _without(ranges: Iterable[_Range], others: list[_Range]) -> Iterator[_Range]:
    """Return the parts of ranges that are in none of the others, which are in order."""
    ends = [other_end for _, other_end in others]
    for first, end in ranges:
        # A process may have tens of thousands of mappings.
        for other_first, other_end in others[bisect_right(ends, first) : bisect_left(others, (end,))]:
            if first < other_first:
                yield first, other_first
            first = max(first, other_end)
        if first < end:
            yield first, end


def _used(ranges: Iterable[_Range], size: int) -> Iterator[_Range]:
    """Return those parts of ranges that are whole large pages and lie in memory entirely."""
    for first, end in ranges:
        first, end = -(-first // size) * size, end // size * size
        if first >= end:
            continue
        there = np.zeros((end - first) // mmap.PAGESIZE, np.uint8)
        if _system().mincore(first, end - first, there.ctypes.data) != 0:
            continue  # unmapped meanwhile
        whole = np.all((there & 1).reshape(-1, size // mmap.PAGESIZE), axis=1)
        at = 0
        for used, group in groupby(whole.tolist()):
            count = len(list(group))
            if used:
                yield first + at * size, first + (at + count) * size
            at += count


def _collapse(ranges: list[_Range], size: int) -> None:
    """Move ranges into large pages. Where Linux cannot do so now it may do so later, by itself."""
    with suppress(OSError):
        for first, end in ranges:
            _advise(first, end, _HUGEPAGE)
        for first, end in ranges:
            for at in range(first, end, _AT_ONCE * size):
                # What was freed meanwhile would be filled with zeros.
                for used in _used([(at, min(at + _AT_ONCE * size, end))], size):
                    _advise(*used, _COLLAPSE)


def _advise(first: int, end: int, advice: int) -> None:
    """Advise Linux, again where it is busy. Raises OSError where it cannot."""
    for _ in range(_TRIES):
        if _system().madvise(first, end - first, advice) == 0:
            return
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EBUSY):
            raise OSError(ctypes.get_errno(), "madvise")


@cache
def _system() -> Any:
    """Return the C library."""
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return library
