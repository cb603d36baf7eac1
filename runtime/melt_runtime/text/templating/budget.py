"""What a rendering may still cost. A template is data of a stranger: every step and every value it makes is counted."""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from time import thread_time
from typing import Any

MAX_STEPS = 10_000_000  # about one node of the template's syntax tree each; two seconds or so
MAX_BYTES = 64 << 20
# What a conversation adds, for each of its characters.
_STEPS_PER_CHARACTER = 16
_BYTES_PER_CHARACTER = 64
# Where steps are cheap and many, or a single one is dear, processor time is the last bound.
MAX_SECONDS = 10.0
_STEPS_PER_LOOK = 1 << 11

MAX_WHOLE = 1 << 63  # larger whole numbers would make arithmetic, text and hashes as slow as a template likes
_VALUE = 24  # characters that a number, None or a container takes in text, generously

_FLAT = (bool, float, type(None))
_NESTED = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class TooMuch(Exception):
    """A template asks for more than it may. No filter of Jinja catches it: it is of none of the usual families."""


class Budget:
    """Steps and bytes that are left to one rendering. ``given``: the size of what it is given, see `size`."""

    def __init__(self, given: int = 0) -> None:
        self.steps = MAX_STEPS + _STEPS_PER_CHARACTER * given
        self.bytes = MAX_BYTES + _BYTES_PER_CHARACTER * given
        self._look = self.steps - _STEPS_PER_LOOK
        self._until = thread_time() + MAX_SECONDS

    def spend(self, steps: int) -> None:
        """Raises TooMuch where so many steps are not left."""
        self.steps -= steps
        if self.steps < self._look:
            if self.steps < 0:
                raise TooMuch("it takes too many steps")
            self._look = self.steps - _STEPS_PER_LOOK
            if thread_time() > self._until:
                raise TooMuch(f"it takes more than {MAX_SECONDS:g} seconds")

    def room(self, count: int) -> None:
        """Raises TooMuch where a value of so many bytes must not be made."""
        if count > self.bytes:
            raise TooMuch("it makes too much text")

    def made(self, value: Any) -> Any:
        """Pays for a value that was made, and returns it."""
        kind = type(value)
        if kind is int:
            if not -MAX_WHOLE <= value <= MAX_WHOLE:
                raise TooMuch("it makes a number of more than 64 bits")
        elif kind not in _FLAT:
            self.bytes -= sys.getsizeof(value)
            self.room(0)
        return value

    def read(self, *values: Any) -> int:
        """Pays for reading values whole, and returns their size."""
        total = 0
        for value in values:
            total += size(value)
        self.spend(1 + (total >> 4))
        return total


def size(value: Any) -> int:
    """About how many characters a value's text has, rather more; a part that is held twice counts twice.

    Raises TooMuch where reading it all would take more steps than are left.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, _FLAT):
        return _VALUE
    most = 16 * current().steps
    total, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str | bytes):
            total += len(one) + 4
        elif isinstance(one, dict):
            total += _VALUE * (1 + len(one))
            waiting.extend(one)
            waiting.extend(one.values())
        elif isinstance(one, range):
            total += _VALUE * (1 + len(one))
        elif isinstance(one, _NESTED):
            total += _VALUE * (1 + len(one))
            if total <= most:
                waiting.extend(one)
        elif isinstance(one, int):
            total += _VALUE + one.bit_length() // 3
        else:
            total += _VALUE
        if total > most:
            raise TooMuch("it handles a value that is too large")
    return total


_current: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def budgeted(given: int = 0) -> Iterator[Budget]:
    """While it lasts, `current` gives a new budget."""
    token = _current.set(Budget(given))
    try:
        yield _current.get()
    finally:
        _current.reset(token)


current = _current.get
