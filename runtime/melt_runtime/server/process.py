"""How the server's process shares out memory and turns."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of glibc's mallopt
_TURN = 0.0005  # seconds that one thread may compute in Python before another has its turn; Python's own are 5 ms


def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):
        return None


_LIBRARY = _glibc()


def settle() -> None:
    """Prepares the process; call it before threads are made.

    With glibc, all threads share two heaps, and what is large lies in none: bodies of a megabyte in many threads would
    otherwise leave as many heaps grown for good. The scheduler's thread, which needs a turn after every loop, gets one
    soon, whatever else computes.
    """
    sys.setswitchinterval(_TURN)
    if _LIBRARY is not None:
        _LIBRARY.mallopt(_ARENA_MAX, 2)
        _LIBRARY.mallopt(_MMAP_THRESHOLD, 1 << 17)


def give_back() -> None:
    """Returns memory that was freed to the system, where the C library keeps it."""
    if _LIBRARY is not None:
        _LIBRARY.malloc_trim(0)
