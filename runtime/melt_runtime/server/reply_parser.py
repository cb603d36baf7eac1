"""Take replies apart as they arrive: reasoning, text, and calls of functions with their arguments."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from ..text.tokenizer import TextTokenizer
from .call_reader import CallReader
from .said import Said
from .tool_formats import THINK, THOUGHT, ToolFormat

_BLANK = " \t\r\n"


class Reading(NamedTuple):
    """How the replies of a call are read. ``names``: the functions that may be called. ``thinking``: whether a reply
    begins in the midst of reasoning; None: the model does not reason aloud."""

    format: ToolFormat
    names: Collection[str]
    thinking: bool | None

    def shown(self, tokenizer: TextTokenizer) -> frozenset[int]:
        """Return the special tokens whose text belongs to a reply."""
        wanted = {THINK, THOUGHT} if self.thinking is not None else set()
        wanted.update(self.format.markers if self.names else ())
        return frozenset(token for token, text in tokenizer.special.items() if text in wanted)


class ReplyParser:
    """Takes one reply apart."""

    def __init__(self, reading: Reading):
        self._reasoning = None if reading.thinking is None else _Reasoning(reading.thinking)
        self._calls = CallReader(reading.format, reading.names) if reading.names else None

    def feed(self, text: str) -> list[Said]:
        """Take text. Return the pieces that are certain."""
        return self._through(text, end=False)

    def finish(self) -> list[Said]:
        """Return the rest at the end of the reply."""
        return self._through("", end=True)

    def _through(self, text: str, end: bool) -> list[Said]:
        said = []
        if self._reasoning is not None:
            thought, text = self._reasoning.feed(text, end)
            if thought:
                said.append(Said("reasoning", thought))
        if self._calls is None:
            return [*said, *([Said("text", text)] if text else [])]
        said += self._calls.feed(text)
        return said + self._calls.finish() if end else said


class _Reasoning:
    """Splits off the reasoning at a reply's beginning. Blanks around it belong to neither part."""

    def __init__(self, begun: bool):
        self._state = self._thinking if begun else self._before
        self._held = ""
        self._begun = False  # whether any reasoning was returned
        self._over: bool | None = None

    @property
    def thinking(self) -> bool:
        """Whether the reply is in the midst of its reasoning."""
        return self._state == self._thinking

    @property
    def over(self) -> bool | None:
        """Whether the reasoning has ended; False: there was none; None: that is not known yet."""
        return self._over

    def feed(self, text: str, end: bool) -> tuple[str, str]:
        """Return the reasoning and the text that are certain."""
        return self._state(self._held + text, end)

    def _before(self, text: str, end: bool) -> tuple[str, str]:
        begun = text.lstrip(_BLANK)
        if begun.startswith(THINK):
            self._state = self._thinking
            return self._thinking(begun[len(THINK) :], end)
        if THINK.startswith(begun) and not end:
            self._held = text
            return "", ""
        self._state, self._held, self._over = self._after_all, "", False
        return "", text

    def _thinking(self, text: str, end: bool) -> tuple[str, str]:
        text = text if self._begun else text.lstrip(_BLANK)
        thought, found, rest = text.partition(THOUGHT)
        if found:
            self._state, self._over = self._after, True
            return thought.rstrip(_BLANK), self._after(rest, end)[1]
        held = 0 if end else _overlap(text, THOUGHT)
        shown = text[: len(text) - held].rstrip(_BLANK)
        self._held, self._begun = text[len(shown) :], self._begun or bool(shown)
        return shown, ""

    def _after(self, text: str, end: bool) -> tuple[str, str]:
        shown, self._held = text.lstrip(_BLANK), ""
        if shown:
            self._state = self._after_all
        return "", shown

    def _after_all(self, text: str, end: bool) -> tuple[str, str]:
        return "", text


def reasoning_tokens(reading: Reading | None, texts: Iterable[str]) -> int | None:
    """Return how many tokens of a reply are its reasoning, from the text of each; None: the model does not reason
    aloud."""
    if reading is None or reading.thinking is None:
        return None
    reasoning, count = _Reasoning(reading.thinking), 0
    for count, text in enumerate(texts, 1):
        reasoning.feed(text, end=False)
        if reasoning.over is not None:
            return count if reasoning.over else 0
    return count if reasoning.thinking else 0


def _overlap(text: str, marker: str) -> int:
    """Return how many characters at a text's end may become the marker."""
    most = min(len(marker) - 1, len(text))
    return next((count for count in range(most, 0, -1) if marker.startswith(text[-count:])), 0)
