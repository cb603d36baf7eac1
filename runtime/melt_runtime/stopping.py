"""Stop strings in a text that arrives in pieces: found wherever the pieces are cut, and never partly shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

from .errors import ArgumentError


def stop_strings(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple: a plain str is one of them, None is none.

    Raises ArgumentError for an empty stop string and for one that is not a str.
    """
    if value is None:
        return ()
    if isinstance(value, bytes | bytearray | memoryview | Mapping) or not isinstance(value, Iterable):
        raise ArgumentError(f"stop must be a text or a list of texts, not of type {type(value).__name__}")
    strings = (value,) if isinstance(value, str) else tuple(value)
    for string in strings:
        if not isinstance(string, str):
            raise ArgumentError(f"A stop string must be text, not {string!r}.")
        if not string:
            raise ArgumentError("A stop string is empty and would stop before the first token; leave it out.")
    return strings


class StopMatcher:
    """Finds the first stop string of a text pushed piece by piece; raises ArgumentError as `stop_strings` does.

    The match that begins earliest wins, and of those that begin together the longest one that is complete. How the
    text is cut into pieces never changes what is emitted. It can change which one of two stop strings that begin
    together is named, because a complete match is not kept waiting for a longer one. At most as many characters
    as the longest stop string has, less one, are held back between two pushes.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop_strings(stop)
        self._reach = max(map(len, self._stop), default=0)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text, once there is one."""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add a piece; returns the text that is safe to emit now and the stop string found, or None.

        The text before the stop string is emitted; it and all that follows never are: later pushes return
        ("", the same stop string).
        """
        if not self._stop:
            return text, None
        if self.found is not None:
            return "", self.found
        text = self._held + text
        undecided = self._undecided(text)
        start, match = self._match(text)
        # A stop string that could still begin before this match would win, so such a match has to wait.
        if match is not None and start <= undecided:
            self._held, self.found = "", match
            return text[:start], match
        self._held = text[undecided:]
        return text[:undecided], None

    def flush(self) -> str:
        """The text still held back, at the end of the text.

        If a match was waiting for one that could begin earlier, only the text before it is returned and `found` is
        set.
        """
        held, self._held = self._held, ""
        start, match = self._match(held)
        if match is None:
            return held
        self.found = match
        return held[:start]

    def _match(self, text: str) -> tuple[int, str | None]:
        """Where the winning complete match begins, and the match; (len(text), None) without one."""
        starts = [(text.find(stop), -len(stop), stop) for stop in self._stop]
        start, _, match = min((s for s in starts if s[0] >= 0), default=(len(text), 0, None))
        return start, match

    def _undecided(self, text: str) -> int:
        """Where the longest end of the text begins that may be the beginning of a stop string; len(text) if none."""
        for start in range(max(0, len(text) - self._reach + 1), len(text)):
            tail = text[start:]
            if any(len(stop) > len(tail) and stop.startswith(tail) for stop in self._stop):
                return start
        return len(text)


def stop_tokens(value: int | Iterable[int] | None) -> frozenset[int]:
    """The ids of stop tokens: one, or any collection of them, an array or a tensor too.

    Raises ArgumentError for what is no whole number.
    """
    if value is None:
        return frozenset()
    try:
        if isinstance(value, bytes | bytearray | memoryview | Mapping):
            raise TypeError("neither a number nor a collection of numbers")
        several = isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0
        ids: list[Any] = [*value] if several else [value]  # type: ignore[misc]
        if any(isinstance(one, bool) for one in ids):
            raise TypeError("True and False are no numbers")
        return frozenset(index(one) for one in ids)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"stop_ids is {value!r}; it must be whole numbers (token ids)") from error
