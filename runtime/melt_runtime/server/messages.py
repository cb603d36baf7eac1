"""The assistant's message in a chat's replies: text, reasoning and calls, whole or as the parts of a stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from .reply_parser import Reading, ReplyParser
from .said import Said

Fields = dict[str, Any]


class MessageWriter:
    """Writes one choice's message. ``reading``: how its text is taken apart; None: it is nothing but text."""

    def __init__(self, reading: Reading | None):
        self._parser = None if reading is None else ReplyParser(reading)
        self._id_length = None if reading is None else reading.format.id_length
        self.calls = 0  # that have begun

    def whole(self, text: str) -> Fields:
        """Return the message of a finished reply."""
        message: Fields = {"role": "assistant", "content": None}
        calls: list[Fields] = []
        for part in self._taken_apart(text, end=True):
            if part.kind == "call":
                self.calls += 1
                calls.append(self._call(part.text))
            elif part.kind == "arguments":
                calls[part.call]["function"]["arguments"] += part.text
            else:
                name = _FIELD[part.kind]
                message[name] = (message.get(name) or "") + part.text
        if calls:
            message["tool_calls"] = calls
        elif message["content"] is None:
            message["content"] = ""
        return message

    def part(self, text: str, end: bool) -> Fields:
        """Return the delta of a stream's part."""
        if self._parser is None:
            return {"content": text}
        delta: Fields = {}
        calls: dict[int, Fields] = {}
        for part in self._taken_apart(text, end):
            if part.kind == "call":
                self.calls += 1
                calls[part.call] = {"index": part.call, **self._call(part.text)}
            elif part.kind == "arguments":
                call = calls.setdefault(part.call, {"index": part.call, "function": {"arguments": ""}})
                call["function"]["arguments"] += part.text
            else:
                name = _FIELD[part.kind]
                delta[name] = delta.get(name, "") + part.text
        return {**delta, **({"tool_calls": list(calls.values())} if calls else {})}

    def _taken_apart(self, text: str, end: bool) -> Iterable[Said]:
        if self._parser is None:
            return [Said("text", text)]
        return self._parser.feed(text) + (self._parser.finish() if end else [])

    def _call(self, name: str) -> Fields:
        """Return the beginning of a call."""
        own = uuid4().hex
        found = f"call_{own[:24]}" if self._id_length is None else own[: self._id_length]
        return {"id": found, "type": "function", "function": {"name": name, "arguments": ""}}


_FIELD = {"text": "content", "reasoning": "reasoning_content"}
