"""Stop strings in streamed text: found across the boundaries of pushes, never shown in part."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

from ..errors import ArgumentError

MAX_STOP_STRINGS = 256
MAX_STOP_CHARACTERS = 8192  # in total; the matcher takes about 250 bytes per character

Symbol = str | int  # a character, or a special token's id, which is never shown


def stop_strings(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the stop strings as a tuple.

    Raises ArgumentError for an empty string, for anything but text, and for more than MAX_STOP_STRINGS strings or
    MAX_STOP_CHARACTERS characters.
    """
    if value is None:
        return ()
    if isinstance(value, bytes | bytearray | memoryview | Mapping) or not isinstance(value, Iterable):
        raise ArgumentError(f"stop must be text or a list of texts, not {type(value).__name__}.")
    if getattr(value, "ndim", 1) == 0:  # arrays without axes pass as Iterable
        raise ArgumentError(f"stop must be text or a list of texts, not {value!r}.")
    strings = (value,) if isinstance(value, str) else tuple(value)
    if len(strings) > MAX_STOP_STRINGS:
        raise ArgumentError(f"There are {len(strings):,} stop strings; at most {MAX_STOP_STRINGS} are allowed.")
    for string in strings:
        if not isinstance(string, str):
            raise ArgumentError(f"A stop string must be text, not {string!r}.")
        if not string:
            raise ArgumentError("A stop string is empty and would stop before the first token; leave it out.")
    length = sum(map(len, strings))
    if length > MAX_STOP_CHARACTERS:
        raise ArgumentError(
            f"The stop strings have {length:,} characters together; at most {MAX_STOP_CHARACTERS:,} are allowed."
        )
    return strings


class StopMatcher:
    """A search for the first stop string in text that arrives in parts. Raises ArgumentError as `stop_strings` does.

    The match that begins earliest wins; of matches that begin together, the longest complete one. The boundaries of
    pushes do not change the text that is emitted. They may change which of two stop strings that begin together is
    reported, because a complete match does not wait for a longer one. Between pushes, at most the longest stop string's
    length less one is held back. A push takes time in proportion to its text, whatever the number of stop strings.

    ``special``: ids of the special tokens that stop strings may contain, by text. Their text is not pushed; their
    places are reported with ``push_special``.
    """

    def __init__(self, stop: Sequence[str], special: Mapping[str, int] | None = None) -> None:
        strings = stop_strings(stop)
        spelled = {_symbols(string, special or {}) for string in strings}
        self.special = frozenset(symbol for symbols in spelled for symbol in symbols if isinstance(symbol, int))
        """The special tokens that stop strings contain."""
        self._automaton = _Automaton({*map(tuple, strings), *spelled})
        self._state = 0  # the automaton's state
        self._held: list[Symbol] = []
        self._match: tuple[int, int] | None = None  # bounds of a complete match in ``_held``
        self.found: str | None = None
        """The stop string that ended the text, without its special tokens; None until then."""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text. Return the text that is safe to emit and the stop string found, or None.

        Text before the stop string is emitted. The stop string and all that follows never are: later pushes return ("",
        the same stop string).
        """
        return self._push(text) if self._automaton else (text, None)

    def push_special(self, token_id: int) -> tuple[str, str | None]:
        """Add a special token, whose text is not shown. Returns as ``push`` does."""
        return self._push([token_id]) if token_id in self.special else ("", self.found)

    def flush(self) -> str:
        """Return the text still held back, at the end of the text.

        If a match was waiting for one that begins earlier, return only the text before it and set ``found``.
        """
        if self._match is not None:
            return self._end(*self._match)
        held, self._held, self._state = self._held, [], 0
        return _text(held)

    def _push(self, symbols: Iterable[Symbol]) -> tuple[str, str | None]:
        if self.found is not None:
            return "", self.found
        held, match, state = self._held, self._match, self._state
        automaton = self._automaton
        for symbol in symbols:
            held.append(symbol)
            state = automaton.step(state, symbol)
            length = automaton.complete[state]
            if length and (match is None or len(held) - length <= match[0]):
                match = (len(held) - length, len(held))
            # Neither an earlier match nor a longer one from here is possible.
            if match is not None and len(held) - automaton.depth[state] > match[0]:
                break
        start = len(held) - automaton.depth[state]  # of the longest suffix that may become a stop string
        if match is not None and start >= match[0]:
            shown = self._end(*match)
            return shown, self.found
        self._state, self._held = state, held[start:]
        self._match = None if match is None else (match[0] - start, match[1] - start)
        return _text(held[:start]), None

    def _end(self, start: int, end: int) -> str:
        """End the text at a match. Return the text before it."""
        shown, self.found = _text(self._held[:start]), _text(self._held[start:end])
        self._held, self._match, self._state = [], None, 0
        return shown


class _Automaton:
    """An Aho-Corasick automaton. A state is the longest prefix of a stop string that the text ends with.

    ``depth``: that prefix's length, by state. ``complete``: the length of the longest stop string that the text ends
    with, by state, or 0.
    """

    def __init__(self, strings: Iterable[tuple[Symbol, ...]]):
        self._next: dict[tuple[int, Symbol], int] = {}
        self.depth, self.complete = [0], [0]
        children: list[list[tuple[Symbol, int]]] = [[]]
        for string in strings:
            state = 0
            for symbol in string:
                after = self._next.get((state, symbol))
                if after is None:
                    after = self._next[state, symbol] = len(self.depth)
                    children[state].append((symbol, after))
                    children.append([])
                    self.depth.append(self.depth[state] + 1)
                    self.complete.append(0)
                state = after
            self.complete[state] = self.depth[state]
        self._fallback = [0] * len(self.depth)  # the next shorter prefix that the text ends with
        states = deque(state for _, state in children[0])
        while states:
            state = states.popleft()
            fallback = self._fallback[state]
            self.complete[state] = self.complete[state] or self.complete[fallback]
            for symbol, after in children[state]:
                self._fallback[after] = self.step(fallback, symbol)
                states.append(after)

    def __bool__(self) -> bool:
        return len(self.depth) > 1

    def step(self, state: int, symbol: Symbol) -> int:
        """Return the state after one more symbol."""
        after = self._next.get((state, symbol))
        while after is None and state:
            state = self._fallback[state]
            after = self._next.get((state, symbol))
        return after or 0


def _symbols(string: str, special: Mapping[str, int]) -> tuple[Symbol, ...]:
    """Split a stop string into characters and the ids of special tokens."""
    if not special:
        return tuple(string)
    names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))  # the longest name wins
    parts = re.split(f"({names})", string)
    return tuple(symbol for part in parts for symbol in ((special[part],) if part in special else part))


def _text(symbols: Iterable[Symbol]) -> str:
    return "".join(symbol for symbol in symbols if isinstance(symbol, str))


def stop_tokens(value: int | Iterable[int] | None) -> frozenset[int]:
    """Return the ids of stop tokens, given as one id or a collection, array or tensor of ids.

    Raises ArgumentError for anything but whole numbers.
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
