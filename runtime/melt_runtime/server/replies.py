"""Replies in OpenAI's shapes. Each choice also has ``depth``, the loops behind each token, and ``token_ids``; at its
end ``saved``, the share of all loops, its prompt's too, that leaving early saved, ``warnings`` if there are any, and
``deadline`` if time was over."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import time
from typing import Any

from ..results import Generation, Logprobs, TextDelta
from ..text.token_bytes import Offsets
from ..text.tokenizer import TextTokenizer

Entry = dict[str, Any]  # the logprobs of one token


@dataclass(frozen=True)
class Form:
    """How the replies of one call look. id: the call's name."""

    chat: bool
    id: str
    model: str
    fingerprint: str
    tokenizer: TextTokenizer | None

    def frame(self, choices: Sequence[dict[str, Any]], part: bool, **more: Any) -> dict[str, Any]:
        """A whole reply, or a part of a stream."""
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

    def whole(self, index: int, deltas: Sequence[TextDelta], end: Generation) -> dict[str, Any]:
        """A finished choice."""
        text = end.text
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        logprobs = _Logprobs(self)
        return self.choice(index, said, deltas, [*logprobs.add(deltas), *logprobs.rest()], end)

    def choice(
        self,
        index: int,
        said: dict[str, Any],
        deltas: Sequence[TextDelta],
        entries: Sequence[Entry],
        end: Generation | None,
    ) -> dict[str, Any]:
        """A choice, or a part of one. ``said``: its text; ``entries``: its logprobs; ``end``: if this is its end."""
        logprobs: dict[str, Any] | None = None
        if entries and self.chat:
            logprobs = {"content": list(entries), "refusal": None}
        elif entries:
            logprobs = {name: [entry[name] for entry in entries] for name in entries[0]}
        return {
            "index": index,
            **said,
            "logprobs": logprobs,
            "finish_reason": None if end is None else _reason(end),
            "depth": [delta.depth for delta in deltas],
            "token_ids": [delta.token_id for delta in deltas],
            **({} if end is None else {"saved": end.saved}),
            **({"warnings": list(end.warnings)} if end is not None and end.warnings else {}),
            **({"deadline": True} if end is not None and end.finish_reason == "deadline" else {}),
        }

    def chat_entry(self, token: int, logprobs: Logprobs) -> Entry:
        """A token of a chat with its logprobs."""
        top = [self._entry(*one) for one in logprobs.top]
        return {**self._entry(token, logprobs.token), "top_logprobs": top}

    def completion_entry(self, token: int, logprobs: Logprobs, offset: int) -> Entry:
        """What a token of a completion adds to each of the lists."""
        top: dict[str, float] = {}
        for one, value in logprobs.top:  # of two tokens with the same text the likelier keeps it
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
        """A token on its own: "bytes:\\xf0\\x9f" where its bytes are no text, "token_id:7" where it has none."""
        own = self._bytes(token)
        if not own:
            return f"token_id:{token}"
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


class StreamedChoice:
    """A choice of a stream, told part by part."""

    def __init__(self, form: Form, index: int):
        self._form, self._index = form, index
        self._logprobs = _Logprobs(form)
        self._told = 0  # characters of its text
        self._first = True

    def part(self, delta: TextDelta | None, end: Generation | None = None) -> dict[str, Any]:
        """Its next token. ``end``: it is the last; without a token there is only what was held back of the text."""
        text = delta.text if delta is not None else end.text[self._told :] if end is not None else ""
        role = {"role": "assistant"} if self._first else {}
        said: dict[str, Any] = {"delta": {**role, "content": text}} if self._form.chat else {"text": text}
        deltas = [] if delta is None else [delta]
        entries = self._logprobs.add(deltas)
        if end is not None:
            entries += self._logprobs.rest()
        self._told += len(text)
        self._first = False
        return self._form.choice(self._index, said, deltas, entries, end)


class _Logprobs:
    """The logprobs of one choice, token by token. The entry of a completion comes once the token's offset in the text
    is known, which is at once but for byte-fallback tokens."""

    def __init__(self, form: Form):
        self._form = form
        self._offsets = None if form.tokenizer is None else Offsets(form.tokenizer.token_bytes)
        self._waiting: deque[tuple[int, Logprobs]] = deque()

    def add(self, deltas: Iterable[TextDelta]) -> list[Entry]:
        """The next tokens; returns the entries that are complete."""
        found: list[Entry] = []
        for delta in deltas:
            if delta.logprobs is None:
                continue
            if self._form.chat:
                found.append(self._form.chat_entry(delta.token_id, delta.logprobs))
                continue
            self._waiting.append((delta.token_id, delta.logprobs))
            found += self._known(self._place(delta.token_id))
        return found

    def rest(self) -> list[Entry]:
        """The entries that are left at the end."""
        return [] if self._offsets is None else self._known(self._offsets.flush())

    def _place(self, token: int) -> list[int]:
        if self._offsets is None or self._form.tokenizer is None:
            return [0]
        return self._offsets.push(token, self._form.tokenizer.shows(token, skip_special_tokens=True))

    def _known(self, offsets: Iterable[int]) -> list[Entry]:
        return [self._form.completion_entry(*self._waiting.popleft(), offset) for offset in offsets]


def _reason(end: Generation) -> str:
    """Why it ended, in OpenAI's words, whose clients know no deadline."""
    return "length" if end.finish_reason == "deadline" else end.finish_reason


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """The counts of a call: prompts once, however many choices, and how much of them had been run before; tokens drawn,
    the ends among them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
