"""The pieces of a reply."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Said(NamedTuple):
    """A piece of a reply: text, reasoning, the beginning of a call (``text`` is the function's name), or more of its
    arguments. ``call``: the call's number, from 0."""

    kind: Literal["text", "reasoning", "call", "arguments"]
    text: str
    call: int = 0
