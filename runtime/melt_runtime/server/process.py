"""Memory and thread settings of the server's process."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # options of glibc's mallopt
_TURN = 0.0005  # seconds before a thread must yield the interpreter; Python's default is 5 ms


def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):
        return None


_LIBRARY = _glibc()


def configure_process() -> None:
    """Configure the process; call it before threads are started.

    With glibc, all threads share two heaps, and large blocks are in neither: otherwise large bodies in many threads
    would leave many grown heaps. Threads yield the interpreter soon, because the scheduler's thread needs it after
    every loop.
    """
    sys.setswitchinterval(_TURN)
    if _LIBRARY is not None:
        _LIBRARY.mallopt(_ARENA_MAX, 2)
        _LIBRARY.mallopt(_MMAP_THRESHOLD, 1 << 17)


def trim_memory() -> None:
    """Return freed memory to the system, if the C library keeps it."""
    if _LIBRARY is not None:
        _LIBRARY.malloc_trim(0)
