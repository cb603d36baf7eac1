"""Greedy decoding of one sequence by a MELT: one token after the other, or staggered.

Plain decoding runs all T loops of a token before the next one begins, so that every token reads the weights T times.
Staggered decoding has up to T successive tokens in one chunk, each in a loop of its own, the oldest in the deepest. A
run of ``loop_step`` moves each of them one loop further. What a token sees in a run, in every layer:

- of tokens that have run all loops: the final key and value;
- of an earlier token in flight: the key and value that this run writes, from that token's own loop;
- its own key and value, which this run writes; nothing of later tokens.

A token enters one run after its predecessor, or later if it corrects a draft. So in loop t it sees the token before it
as loop t + 1 (or a later one) left it, and the one n tokens before it as loop min(T, t + n) left it. Chunks in training
show the same loop, t, and plain decoding always shows the final one, T. In its last two loops a token sees the one
before it as in plain decoding. Staggered decoding of a shared cache is therefore another mathematics, between the two,
and greedy tokens may differ.

After every run the head reads all tokens in flight. A word read after a token's last loop is final. Where the newest
word for a place differs from the token that entered there, that token and all behind it are dropped, and the new word
enters in its place; tokens before it keep their loops. So one token enters per run, as long as there is one to run.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import ChunkAttention, MeltCache
from .melt import MeltForCausalLM, MeltModel


@dataclass(frozen=True)
class Decoded:
    """Greedy tokens, a stop included, and the runs of the loop step that they took after the prompt."""

    tokens: list[int]
    runs: int


class TokensInFlight:
    """Successive tokens of one sequence that stand in one chunk, each in a loop of its own, the oldest first.

    ``tokens``, ``loops``: each token and the loops that it has run, fewer from one to the next. ``hidden``: (1, tokens,
    d). ``latent``: (layers, 1, tokens, latent_size). Earlier tokens are in ``cache``. Prelude and coda run with every
    loop over all tokens in flight.
    """

    def __init__(self, model: MeltModel, cache: MeltCache):
        self.model, self.cache = model, cache
        self.tokens: list[int] = []
        self.loops: list[int] = []
        empty = model.embed_tokens(torch.zeros(1, 0, dtype=torch.long, device=model.embed_tokens.weight.device))
        self.hidden = empty
        self.latent = empty.new_zeros(len(model.layers), 1, 0, model.config.latent_size)

    def __len__(self) -> int:
        return len(self.tokens)

    def enter(self, token: int) -> None:
        """Add a token behind the others."""
        self.hidden, self.latent = (F.pad(state, (0, 0, 0, 1)) for state in (self.hidden, self.latent))
        self.tokens.append(token)
        self.loops.append(0)

    def run(self) -> Tensor:
        """Run the next loop of every token in flight. Return what the head reads, (1, tokens, d)."""
        model, config = self.model, self.model.config
        first_loop = torch.tensor([[loops == 0 for loops in self.loops]], device=self.hidden.device)
        active = torch.ones_like(first_loop)
        attend = ChunkAttention(config, self.cache, active, config.first_cache("prelude"))
        injected = model.prelude(model.embed_tokens(torch.tensor([self.tokens], device=self.hidden.device)), attend)
        start = model.start(injected, attend.positions)
        hidden = torch.where(first_loop.unsqueeze(-1), start, self.hidden)
        attend.first = config.first_cache("core")
        step = model.loop_step(hidden, self.latent, first_loop, active, attend, injected)
        self.hidden, self.latent = step.hidden, step.latent
        self.loops = [loops + 1 for loops in self.loops]
        attend.first = config.first_cache("coda")
        return model.coda(step.hidden, attend)

    def keep(self, first: int, last: int) -> None:
        """Keep the tokens from ``first`` to ``last - 1``. The older ones are final and stay in the cache."""
        if first:
            self.cache.commit(torch.ones(1, first, dtype=torch.bool, device=self.hidden.device))
            self.cache.columns += first
        self.tokens, self.loops = self.tokens[first:last], self.loops[first:last]
        self.hidden, self.latent = self.hidden[:, first:last], self.latent[:, :, first:last]


@torch.no_grad()
def greedy_tokens(
    model: MeltForCausalLM,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    decode: Literal["plain", "staggered"] = "plain",
    stop_ids: Container[int] = (),
    num_loops: int | None = None,
    chunk_size: int | None = None,
    lanes: int | None = None,
) -> Decoded:
    """Return the greedy tokens after a prompt; every token runs all loops. Computes in the model's own type.

    ``decode``: "plain" or "staggered" (see the module). ``num_loops``, ``chunk_size`` (of the prompt): the
    configuration's if None. ``lanes``: the most tokens in flight, as many as loops if None. Raises ValueError for
    values that cannot be used.
    """
    loops = model.config.total_ut_steps if num_loops is None else num_loops
    lanes = max(loops, 1) if lanes is None else lanes
    if decode not in ("plain", "staggered"):
        raise ValueError(f'decode is {decode!r}; it must be "plain" or "staggered"')
    if max_tokens < 1 or lanes < 1:
        raise ValueError(f"max_tokens is {max_tokens} and lanes {lanes}; both must be 1 or more")
    cache = MeltCache(model.config.first_cache("core", 1))
    ids = torch.tensor([list(prompt)], device=model.device, dtype=torch.long)
    output = model(
        ids, past_key_values=cache, num_loops=loops, chunk_size=chunk_size, exit_threshold=1.0, logits_to_keep=1
    )
    tokens, runs = [int(output.logits[0, -1].argmax())], 0
    flight, most = TokensInFlight(model.model, cache), 1 if decode == "plain" else lanes
    flight.enter(tokens[0])
    while len(tokens) < max_tokens and tokens[-1] not in stop_ids:
        words = model.lm_head(flight.run()[0]).argmax(-1).tolist()
        runs += 1
        right = next((at for at in range(1, len(flight)) if flight.tokens[at] != words[at - 1]), len(flight))
        final = int(flight.loops[0] == loops)
        tokens += words[:final]
        flight.keep(final, right)
        newest = words[right - 1]
        if len(flight) < most and len(tokens) + len(flight) < max_tokens and newest not in stop_ids:
            flight.enter(newest)
    return Decoded(tokens, runs)
