"""The budget of one rendering. Templates are untrusted: every step and every value they make is counted."""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from time import thread_time
from typing import Any

MAX_STEPS = 10_000_000  # a step is about one node of the syntax tree; together about two seconds
MAX_BYTES = 64 << 20
# Added to the budget per character of the conversation.
_STEPS_PER_CHARACTER = 16
_BYTES_PER_CHARACTER = 64
# Processor time, for steps that take longer than usual.
MAX_SECONDS = 10.0
_STEPS_PER_CHECK = 1 << 11

MAX_WHOLE = 1 << 63  # larger integers would make arithmetic, formatting and hashing arbitrarily slow
_VALUE = 24  # characters of a number, None or container as text, at most

_FLAT = (bool, float, type(None))
_NESTED = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class TooMuch(Exception):
    """A template exceeded its budget. Derived from Exception directly, so that no Jinja filter catches it."""


class Budget:
    """The steps and bytes left to one rendering. ``given``: the size of its variables, see `size`."""

    def __init__(self, given: int = 0) -> None:
        self.steps = MAX_STEPS + _STEPS_PER_CHARACTER * given
        self.bytes = MAX_BYTES + _BYTES_PER_CHARACTER * given
        self._next_check = self.steps - _STEPS_PER_CHECK
        self._until = thread_time() + MAX_SECONDS

    def spend(self, steps: int) -> None:
        """Use up steps. Raises TooMuch if fewer are left."""
        self.steps -= steps
        if self.steps < self._next_check:
            if self.steps < 0:
                raise TooMuch("it takes too many steps")
            self._next_check = self.steps - _STEPS_PER_CHECK
            if thread_time() > self._until:
                raise TooMuch(f"it takes more than {MAX_SECONDS:g} seconds")

    def room(self, count: int) -> None:
        """Raise TooMuch if a value of ``count`` bytes must not be made."""
        if count > self.bytes:
            raise TooMuch("it makes too much text")

    def made(self, value: Any) -> Any:
        """Count the bytes of a new value and return it. Raises TooMuch."""
        kind = type(value)
        if kind is int:
            if not -MAX_WHOLE <= value <= MAX_WHOLE:
                raise TooMuch("it makes a number of more than 64 bits")
        elif kind not in _FLAT:
            self.bytes -= sys.getsizeof(value)
            self.room(0)
        return value

    def read(self, *values: Any) -> int:
        """Count the steps of reading whole values and return their size. Raises TooMuch."""
        total = 0
        for value in values:
            total += size(value)
        self.spend(1 + (total >> 4))
        return total


def size(value: Any) -> int:
    """Return an upper estimate of the characters of a value's text; shared parts count each time.

    Raises TooMuch if reading it all would take more steps than are left.
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
    """Make a new budget the current one for the length of the block."""
    token = _current.set(Budget(given))
    try:
        yield _current.get()
    finally:
        _current.reset(token)


current = _current.get
