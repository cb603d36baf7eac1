"""Replies in OpenAI's shapes. Each choice also has ``depth``, the loops behind each token, and ``token_ids``; at its
end ``saved``, the share of all loops, its prompt's too, that leaving early saved, ``warnings`` if there are any, and
``deadline`` if time was over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import time
from typing import Any

from ..text import TextCodec
from ..track import Generation, Piece


@dataclass(frozen=True)
class Form:
    """How the replies of one call look. id: the call's name."""

    chat: bool
    id: str
    model: str
    fingerprint: str
    codec: TextCodec | None

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

    def whole(self, index: int, pieces: Sequence[Piece], end: Generation) -> dict[str, Any]:
        """A finished choice."""
        text = end.text
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._choice(index, said, pieces, 0, end)

    def part(
        self, index: int, piece: Piece | None, offset: int, first: bool, end: Generation | None = None
    ) -> dict[str, Any]:
        """A choice's next token, ``offset`` characters into its text. ``end``: it is the last; without a token there is
        only what was held back of the text."""
        text = piece.text if piece is not None else end.text[offset:] if end is not None else ""
        role = {"role": "assistant"} if first else {}
        said: dict[str, Any] = {"delta": {**role, "content": text}} if self.chat else {"text": text}
        return self._choice(index, said, [] if piece is None else [piece], offset, end)

    def _choice(
        self, index: int, said: dict[str, Any], pieces: Sequence[Piece], offset: int, end: Generation | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            **said,
            "logprobs": self._logprobs(pieces, offset),
            "finish_reason": None if end is None else _reason(end),
            "depth": [piece.depth for piece in pieces],
            "token_ids": [piece.token_id for piece in pieces],
            **({} if end is None else {"saved": end.saved}),
            **({"warnings": list(end.warnings)} if end is not None and end.warnings else {}),
            **({"deadline": True} if end is not None and end.finish_reason == "deadline" else {}),
        }

    def _logprobs(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any] | None:
        found = [(piece, piece.logprobs) for piece in pieces if piece.logprobs is not None]
        if not found:
            return None
        if self.chat:
            content = [
                {
                    **self._entry(piece.token_id, logprobs.token),
                    "top_logprobs": [self._entry(*one) for one in logprobs.top],
                }
                for piece, logprobs in found
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for piece, _ in found:
            offsets.append(offset)
            offset += len(piece.text)
        return {
            "tokens": [self._text(piece.token_id) for piece, _ in found],
            "token_logprobs": [logprobs.token for _, logprobs in found],
            "top_logprobs": [{self._text(i): value for i, value in logprobs.top} for _, logprobs in found],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        """A token on its own; the number of one that has no text."""
        shown = "" if self.codec is None else self.codec.decode([token], skip_special_tokens=False)
        return shown or f"token_id:{token}"


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
