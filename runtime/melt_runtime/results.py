"""The results of generation: finished sequences, and the deltas of running ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PipelineUse:
    """What pipelined decoding did for one sequence.

    ``runs``: runs of the loop step. ``tokens``: tokens that these brought through all loops. ``rows``: tokens in
    flight, summed over the runs. ``held``, ``dropped``: drafts by the loop that predicted them, counted from 1: those
    that were the sequence's next token, and those that were not.
    """

    runs: int
    tokens: int
    rows: int
    held: tuple[int, ...]
    dropped: tuple[int, ...]

    @property
    def runs_per_token(self) -> float:
        """Runs of the loop step per token; plain decoding takes as many as the token has loops."""
        return self.runs / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, eq=False)
class LoopStates:
    """What a sequence's tokens are after every loop, in float32.

    - ``hidden``: (loops, tokens, d), what the next loop reads.
    - ``logits``: (loops, tokens, vocab), what the model would say if that loop were the last; None if not asked for.
    - ``exit_probability``: (loops, tokens); None for a model without an exit gate.
    """

    token_ids: tuple[int, ...]
    hidden: NDArray[np.float32]
    logits: NDArray[np.float32] | None
    exit_probability: NDArray[np.float32] | None


@dataclass(frozen=True)
class Generation:
    """A finished sequence.

    ``finish_reason``: "stop" (a stop id or string), "length" (max_tokens, or a full cache), and from a scheduler also
    "cancelled" and "deadline". ``depth``: the loops run for each token in the cache, including the prompt. ``loops``:
    the most loops that a token could run. ``cached_tokens``: how many prompt tokens were restored from a prefix cache
    instead of run; not compared. ``warnings``: sentences that say why the answer may be poor. ``pipeline``: what
    pipelined decoding did; None where every token was decoded by itself; not compared.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    depth: tuple[int, ...]
    loops: int
    cached_tokens: int = field(default=0, compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)
    pipeline: PipelineUse | None = field(default=None, compare=False)

    @property
    def saved(self) -> float:
        """The share of loops that early exit saved, of ``loops`` per token."""
        most = self.loops * len(self.depth)
        return 1 - sum(self.depth) / most if most else 0.0


@dataclass(frozen=True)
class Logprobs:
    """Natural log probabilities of a token, before temperature, penalties and constraints.

    ``token``: that of the sampled token. ``top``: the likeliest ids with theirs, likeliest first.
    """

    token: float
    top: tuple[tuple[int, float], ...]


class TextDelta(NamedTuple):
    """One step of one sequence: the sampled token, and the text that is now safe to show (may be empty).

    ``finish_reason``: None while the sequence runs. ``depth``: loops run for the preceding token, which gave this
    token's logits. ``logprobs``: None unless requested.
    """

    slot: int
    text: str
    token_id: int
    finish_reason: str | None
    depth: int
    logprobs: Logprobs | None = None
