"""Stop strings in a text that arrives in pieces: found wherever the pieces are cut, and never partly shown."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

from ..errors import ArgumentError

MAX_STOP_STRINGS = 256
MAX_STOP_CHARACTERS = 8192  # of all together; the matcher takes about 250 bytes for each

Symbol = str | int  # a character, or the id of a special token, whose text is never shown


def stop_strings(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple: a plain str is one of them, None is none.

    Raises ArgumentError for an empty stop string, for what is not text, and for more than MAX_STOP_STRINGS strings or
    MAX_STOP_CHARACTERS characters.
    """
    if value is None:
        return ()
    if isinstance(value, bytes | bytearray | memoryview | Mapping) or not isinstance(value, Iterable):
        raise ArgumentError(f"stop must be text or a list of texts, not {type(value).__name__}.")
    if getattr(value, "ndim", 1) == 0:  # an array of no axis calls itself iterable
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
    """Finds the first stop string of a text pushed piece by piece; raises ArgumentError as `stop_strings` does.

    The match that begins earliest wins, and of those that begin together the longest one that is complete. How the
    text is cut into pieces never changes what is emitted. It can change which one of two stop strings that begin
    together is named, because a complete match is not kept waiting for a longer one. At most as many characters
    as the longest stop string has, less one, are held back between two pushes. A push costs time in proportion to its
    text, however many stop strings there are.

    special: text -> id of the special tokens that stop strings may name. Their text is not part of the text pushed:
    ``push_special`` says where one stood.
    """

    def __init__(self, stop: Sequence[str], special: Mapping[str, int] | None = None) -> None:
        strings = stop_strings(stop)
        spelled = {_symbols(string, special or {}) for string in strings}
        self.special = frozenset(symbol for symbols in spelled for symbol in symbols if isinstance(symbol, int))
        """The special tokens that a stop string names."""
        self._automaton = _Automaton({*map(tuple, strings), *spelled})
        self._state = 0  # how far the end of the text is into a stop string
        self._held: list[Symbol] = []
        self._match: tuple[int, int] | None = None  # where a complete match lies in what is held
        self.found: str | None = None
        """The stop string that ended the text, once there is one; special tokens are left out of it."""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add a piece; returns the text that is safe to emit now and the stop string found, or None.

        The text before the stop string is emitted; it and all that follows never are: later pushes return
        ("", the same stop string).
        """
        return self._push(text) if self._automaton else (text, None)

    def push_special(self, token_id: int) -> tuple[str, str | None]:
        """A special token stands here, of which no text is shown; returns as ``push`` does."""
        return self._push([token_id]) if token_id in self.special else ("", self.found)

    def flush(self) -> str:
        """The text still held back, at the end of the text.

        If a match was waiting for one that could begin earlier, only the text before it is returned and `found` is
        set.
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
            # No match that begins earlier is possible, nor a longer one that begins here.
            if match is not None and len(held) - automaton.depth[state] > match[0]:
                break
        start = len(held) - automaton.depth[state]  # of the longest end that may become a stop string
        if match is not None and start >= match[0]:
            shown = self._end(*match)
            return shown, self.found
        self._state, self._held = state, held[start:]
        self._match = None if match is None else (match[0] - start, match[1] - start)
        return _text(held[:start]), None

    def _end(self, start: int, end: int) -> str:
        """The text before a match, which ends the text."""
        shown, self.found = _text(self._held[:start]), _text(self._held[start:end])
        self._held, self._match, self._state = [], None, 0
        return shown


class _Automaton:
    """The automaton of Aho and Corasick: a state for each beginning of a stop string, the longest that the text ends
    with. depth: the length of that beginning by state; complete: the length of the longest stop string that the text
    ends with, or 0."""

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
        self._fallback = [0] * len(self.depth)  # the longest shorter beginning that the text ends with as well
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
        """The state after one more symbol."""
        after = self._next.get((state, symbol))
        while after is None and state:
            state = self._fallback[state]
            after = self._next.get((state, symbol))
        return after or 0


def _symbols(string: str, special: Mapping[str, int]) -> tuple[Symbol, ...]:
    """A stop string with an id in place of each special token that it names."""
    if not special:
        return tuple(string)
    names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))  # the longest name wins
    parts = re.split(f"({names})", string)
    return tuple(symbol for part in parts for symbol in ((special[part],) if part in special else part))


def _text(symbols: Iterable[Symbol]) -> str:
    return "".join(symbol for symbol in symbols if isinstance(symbol, str))


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
