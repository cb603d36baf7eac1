"""Given tokens that run staggered: when each of them enters, and what PyTorch computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from melt_models.decoding import TokensInFlight
from numpy.typing import NDArray

from .float32_matmul import FLOAT32, Arithmetic
from .pytorch import Reference, computing, every_loop


@dataclass(frozen=True)
class StaggeredRun:
    """The tokens in flight after a run of the loop step, the oldest first.

    - ``loops``: the loops that each of them has run.
    - ``hidden``: (tokens, d).
    - ``logits``: (tokens, vocab).
    """

    loops: tuple[int, ...]
    hidden: NDArray[Any]
    logits: NDArray[Any]


def schedule(count: int, loops: int, lanes: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield for each run how many of ``count`` tokens are final, and the loops that each token in flight has run.

    One token enters per run while fewer than ``lanes`` are in flight, and leaves after its last loop.
    """
    final, flight = 0, list[int]()
    while final < count:
        if len(flight) < lanes and final + len(flight) < count:
            flight.append(0)
        yield final, tuple(flight)
        flight = [done + 1 for done in flight]
        if flight[0] == loops:
            del flight[0]
            final += 1


def staggered_runs(
    reference: Reference,
    prompt: Sequence[int],
    tokens: Sequence[int],
    loops: int,
    chunk: int,
    lanes: int,
    arithmetic: Arithmetic = FLOAT32,
) -> list[StaggeredRun]:
    """Run a prompt in chunks, then given tokens staggered. Return every run, in float32."""
    cache, model, found = reference.cache(), reference.model, []
    with computing(arithmetic):
        if prompt:
            ids = torch.tensor([list(prompt)])
            model(ids, past_key_values=cache, logits_to_keep=1, **every_loop(model, loops, chunk))
        flight = TokensInFlight(model.model, cache)
        for final, before in schedule(len(tokens), loops, lanes):
            if before[-1] == 0:
                flight.enter(tokens[final + len(before) - 1])
            logits = model.lm_head(flight.run()[0])
            found.append(StaggeredRun(tuple(flight.loops), *(x.float().numpy() for x in (flight.hidden[0], logits))))
            if flight.loops[0] == loops:
                flight.keep(1, len(flight))
    return found
