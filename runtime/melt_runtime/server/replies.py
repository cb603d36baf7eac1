"""Replies in OpenAI's formats.

Each choice also has ``depth``, the loops behind each token, and ``token_ids``; at its end ``saved``, the share of loops
that early exit saved, prompt included, ``warnings`` if any, and ``deadline`` if time ran out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import time
from typing import Any

from ..results import Generation, Logprobs, TextDelta
from ..text.text_before import text_before
from ..text.token_bytes import Offsets
from ..text.tokenizer import TextTokenizer
from .messages import MessageWriter
from .reply_parser import Reading

Entry = dict[str, Any]  # one token's logprobs


@dataclass(frozen=True)
class Echo:
    """The prompt that a completion's text begins with. ``logprobs``: of its tokens; None: they were not asked for."""

    text: str
    tokens: Sequence[int]
    logprobs: Iterable[Logprobs | None] | None


@dataclass(frozen=True)
class ReplyFormat:
    """The format of one call's replies. ``id``: the call's id. ``reading``: how a chat's replies are taken apart."""

    chat: bool
    id: str
    model: str
    fingerprint: str
    tokenizer: TextTokenizer | None
    reading: Reading | None = None

    def frame(self, choices: Sequence[dict[str, Any]], part: bool, **more: Any) -> dict[str, Any]:
        """Return a whole reply, or a part of a stream."""
        kind = ("chat.completion.chunk" if part else "chat.completion") if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": int(time()),
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
            **more,
        }

    def whole(
        self,
        index: int,
        deltas: Sequence[TextDelta],
        end: Generation,
        echo: Echo | None = None,
        prompt: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Return a finished choice. ``prompt``: the tokens that it continues."""
        text = end.text if echo is None else echo.text + end.text
        writer = MessageWriter(self.reading)
        said: dict[str, Any] = {"message": writer.whole(text)} if self.chat else {"text": text}
        logprobs = _Logprobs(self, echo, prompt)
        return self.choice(index, said, deltas, [*logprobs.add(deltas), *logprobs.rest()], end, writer.calls > 0)

    def choice(
        self,
        index: int,
        said: dict[str, Any],
        deltas: Sequence[TextDelta],
        entries: Sequence[Entry],
        end: Generation | None,
        calls: bool = False,
    ) -> dict[str, Any]:
        """Return a choice or a part of one. ``said``: its text. ``entries``: its logprobs. ``end``: set if this is its
        end. ``calls``: whether it calls a function."""
        logprobs: dict[str, Any] | None = None
        if entries and self.chat:
            logprobs = {"content": list(entries), "refusal": None}
        elif entries:
            logprobs = {name: [entry[name] for entry in entries] for name in entries[0]}
        return {
            "index": index,
            **said,
            "logprobs": logprobs,
            "finish_reason": None if end is None else _reason(end, calls),
            "depth": [delta.depth for delta in deltas],
            "token_ids": [delta.token_id for delta in deltas],
            **({} if end is None else {"saved": end.saved}),
            **({"warnings": list(end.warnings)} if end is not None and end.warnings else {}),
            **({"deadline": True} if end is not None and end.finish_reason == "deadline" else {}),
        }

    def chat_entry(self, token: int, logprobs: Logprobs) -> Entry:
        """Return the logprobs entry of a chat's token."""
        top = [self._entry(*one) for one in logprobs.top]
        return {**self._entry(token, logprobs.token), "top_logprobs": top}

    def completion_entry(self, token: int, logprobs: Logprobs | None, offset: int) -> Entry:
        """Return what a completion's token adds to each of the logprobs lists. ``logprobs``: None for a prompt's first
        token, which follows nothing."""
        if logprobs is None:
            return {"tokens": self._text(token), "token_logprobs": None, "top_logprobs": None, "text_offset": offset}
        top: dict[str, float] = {}
        for one, value in logprobs.top:  # of two tokens with the same text, the likelier keeps it
            text = self._text(one)
            top[f"token_id:{one}" if text in top else text] = value
        return {
            "tokens": self._text(token),
            "token_logprobs": logprobs.token,
            "top_logprobs": top,
            "text_offset": offset,
        }

    def _entry(self, token: int, logprob: float) -> Entry:
        return {"token": self._text(token), "logprob": logprob, "bytes": list(self._bytes(token))}

    def _bytes(self, token: int) -> bytes:
        return b"" if self.tokenizer is None else self.tokenizer.token_bytes.of(token)

    def _text(self, token: int) -> str:
        """Return a token's own text: "bytes:\\xf0\\x9f" if its bytes are not text, "token_id:7" if it has none."""
        own = self._bytes(token)
        if not own:
            return f"token_id:{token}"
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


class StreamedChoice:
    """A choice of a stream, sent in parts."""

    def __init__(
        self,
        format: ReplyFormat,
        index: int,
        echo: Callable[[], Echo | None] = lambda: None,
        prompt: Sequence[int] = (),
    ):
        """``echo``: returns the prompt that the text begins with, when the first part is made. ``prompt``: the tokens
        that the choice continues."""
        self._format, self._index, self._echo = format, index, echo
        self._prompt = prompt
        self._logprobs = _Logprobs(format, None, prompt)
        self._writer = MessageWriter(format.reading)
        self._told = 0  # characters already sent
        self._first = True

    def part(self, delta: TextDelta | None, end: Generation | None = None) -> dict[str, Any]:
        """Return the part for the next token. ``end``: set with the last; without a token, it holds only text held
        back."""
        text = delta.text if delta is not None else end.text[self._told :] if end is not None else ""
        echo = self._echo() if self._first else None
        if echo is not None:
            self._logprobs = _Logprobs(self._format, echo, self._prompt)
        role = {"role": "assistant"} if self._first else {}
        chat = self._format.chat
        said: dict[str, Any] = (
            {"delta": {**role, **self._writer.part(text, end is not None)}} if chat else {"text": text}
        )
        deltas = [] if delta is None else [delta]
        entries = self._logprobs.add(deltas)
        if end is not None:
            entries += self._logprobs.rest()
        self._told += len(text)
        self._first = False
        if echo is not None:
            said = {"text": echo.text + text}
        return self._format.choice(self._index, said, deltas, entries, end, self._writer.calls > 0)


class _Logprobs:
    """One choice's logprobs, token by token: those of the prompt that it repeats, then its own. A completion's entry is
    complete once the token's text offset is known, which is delayed only for byte-fallback tokens."""

    def __init__(self, format: ReplyFormat, echo: Echo | None, prompt: Sequence[int]):
        self._format = format
        self._waiting: deque[tuple[int, Logprobs | None]] = deque()
        self._begin_text(0, () if echo is not None else prompt)
        self._told: list[Entry] = []  # of the prompt
        if echo is not None:
            for token, logprobs in zip(echo.tokens, echo.logprobs or (), strict=False):
                self._waiting.append((token, logprobs))
                self._told += self._known(self._place(token))
            self._told += self.rest()
            self._begin_text(len(echo.text), prompt)

    def _begin_text(self, start: int, prompt: Sequence[int]) -> None:
        """Begin a text at a place of the whole. ``prompt``: the tokens that it continues."""
        self._start, tokenizer = start, self._format.tokenizer
        self._offsets: Offsets | None = None
        if tokenizer is not None:
            before = text_before(tokenizer, prompt)
            self._offsets = Offsets(tokenizer.token_bytes, bool(before.tokens), before.open)

    def add(self, deltas: Iterable[TextDelta]) -> list[Entry]:
        """Add tokens. Return the entries that are complete."""
        found, self._told = self._told, []
        for delta in deltas:
            if delta.logprobs is None:
                continue
            if self._format.chat:
                found.append(self._format.chat_entry(delta.token_id, delta.logprobs))
                continue
            self._waiting.append((delta.token_id, delta.logprobs))
            found += self._known(self._place(delta.token_id))
        return found

    def rest(self) -> list[Entry]:
        """Return the remaining entries at the end."""
        return [] if self._offsets is None else self._known(self._offsets.flush())

    def _place(self, token: int) -> list[int]:
        if self._offsets is None or self._format.tokenizer is None:
            return [0]
        return self._offsets.push(token, self._format.tokenizer.shows(token, skip_special_tokens=True))

    def _known(self, offsets: Iterable[int]) -> list[Entry]:
        start = self._start
        return [self._format.completion_entry(*self._waiting.popleft(), start + offset) for offset in offsets]


def _reason(end: Generation, calls: bool) -> str:
    """Return the finish reason in OpenAI's terms, which have no deadline."""
    if end.finish_reason == "stop" and calls:
        return "tool_calls"
    return "length" if end.finish_reason == "deadline" else end.finish_reason


def usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning: int | None = None
) -> dict[str, Any]:
    """Return a call's token counts.

    Prompts count once, whatever the number of choices. ``completion_tokens``: sampled tokens, end tokens included.
    ``cached_tokens``: prompt tokens that did not have to run. ``reasoning``: sampled tokens that are reasoning; None:
    the model does not reason aloud.
    """
    details = {} if reasoning is None else {"completion_tokens_details": {"reasoning_tokens": reasoning}}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        **details,
    }
