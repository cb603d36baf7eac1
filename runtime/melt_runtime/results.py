"""What generation gives back: finished sequences, and the deltas of running ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Generation:
    """A finished sequence. ``finish_reason``: "stop" (a stop id or string), "length" (max_tokens, or the cache is
    full), and from a scheduler also "cancelled" and "deadline". ``depth``: loops spent on each token that went through
    the model, the prompt's included; ``loops``: the most that one could have had; ``cached_tokens``: how many of the
    prompt's a scheduler put back from what ran before, which changes nothing else and is not compared; ``warnings``:
    why the answer may disappoint, a sentence each."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    depth: tuple[int, ...]
    loops: int
    cached_tokens: int = field(default=0, compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def saved(self) -> float:
        """The share of the compute that leaving early saved: loops that were not run, of loops times tokens."""
        most = self.loops * len(self.depth)
        return 1 - sum(self.depth) / most if most else 0.0


@dataclass(frozen=True)
class Logprobs:
    """How likely the model found a token, before temperature, penalties and constraints: natural logarithms.

    ``token``: of the token that was drawn; ``top``: the likeliest ids and theirs, likeliest first.
    """

    token: float
    top: tuple[tuple[int, float], ...]


class TextDelta(NamedTuple):
    """What one step added to one sequence: text that is safe to show (perhaps ""), the token, and the end, if it is.

    ``depth``: loops spent on the token before it, whose logits it was drawn from; ``logprobs``: if they were asked for.
    """

    slot: int
    text: str
    token_id: int
    finish_reason: str | None
    depth: int
    logprobs: Logprobs | None = None
