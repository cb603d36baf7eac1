"""Forward of a MELT chunk by chunk, with gradients: both training phases use it.

Chunks run one after the other, each with all its loops; a chunk's tokens run in parallel. Gradients flow through the
keys and values of earlier chunks unless they are cut. With ``alpha`` below 1 attention reads interpolated keys and
values (phase 1 of arXiv 2605.07721): ``KV = alpha KV_melt + (1 - alpha) KV_looplm``. The LoopLM side is the same loop's
``a_t W_K, a_t W_V``, so earlier chunks then keep one set of keys and values per loop. The mathematics is that of
``core.py``. A model with a coda runs it after every loop; later chunks read the keys and values of the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from ..core import DEFAULT_START, Start
from ..layers import masked_attention, merge_heads, rotary_tables, rotate, split_heads
from ..looplm import LoopLMForCausalLM, causal_mask, exit_distribution
from ..melt import MeltModel


@dataclass(frozen=True)
class ChunkStates:
    """States of a chunk, loop by loop.

    - ``hidden``: (loops, batch, chunk, d); ``read``: of the same shape, what the head reads.
    - ``exit_probability``: (loops, batch, chunk); None for a model without an exit gate.
    - ``attention``: (loops, layers, batch, chunk, heads * head_dim), the attention outputs before their projection.
    """

    hidden: Tensor
    read: Tensor
    exit_probability: Tensor | None
    attention: Tensor

    def part(self, start: int, end: int) -> ChunkStates:
        """Return the states of the tokens from ``start`` to ``end`` of the chunk."""
        own = slice(start, end)
        exits = None if self.exit_probability is None else self.exit_probability[..., own]
        return ChunkStates(self.hidden[..., own, :], self.read[..., own, :], exits, self.attention[..., own, :])

    @classmethod
    def join(cls, chunks: Sequence[ChunkStates]) -> ChunkStates:
        """Return the states of several chunks with as many loops, one after the other."""
        exits = [chunk.exit_probability for chunk in chunks if chunk.exit_probability is not None]
        return cls(
            torch.cat([chunk.hidden for chunk in chunks], dim=-2),
            torch.cat([chunk.read for chunk in chunks], dim=-2),
            torch.cat(exits, dim=-1) if exits else None,
            torch.cat([chunk.attention for chunk in chunks], dim=-2),
        )


class _ChunkAttention:
    """Attention of one chunk in a stage or in one loop, which records its inputs, keys, values and outputs.

    ``past`` holds the keys and values of earlier chunks, each (2, layers, batch, kv_heads, chunk, head_dim), keys
    first. ``seen`` receives every layer's normed input a_t where the LoopLM side is needed. Running a layer again, as
    gradient checkpointing does, stores the same values again.
    """

    def __init__(
        self, model: MeltModel, layers: int, past: Sequence[Tensor], start: int, chunk: int, alpha: float = 1.0
    ):
        self.model, self.past, self.alpha = model, past, alpha
        device = model.embed_tokens.weight.device
        self.positions = torch.arange(start, start + chunk, device=device)
        self.cos, self.sin = (table[None] for table in rotary_tables(model.config, self.positions))
        self.mask = (torch.arange(start + chunk, device=device) <= self.positions[:, None])[None]
        self.seen: list[Any] = [None] * layers
        self.rows: list[Any] = [None] * layers  # MELT's keys and values
        self.loop_rows: list[Any] = [None] * layers  # LoopLM's
        self.outputs: list[Any] = [None] * layers

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own = self.rows[layer] = self._rows(key, value)
        if self.alpha < 1:
            attention: Any = self.model.layers[layer].self_attn
            a = self.seen[layer]
            self.loop_rows[layer] = self._rows(attention.k_norm(attention.k_proj(a)), attention.v_proj(a))
            own = blend(own, self.loop_rows[layer], self.alpha)
        keys, values = torch.cat([*(rows[:, layer] for rows in self.past), own], dim=-2).unbind()
        query = self._rotate(split_heads(query, self.model.config.head_dim))
        output = self.outputs[layer] = merge_heads(masked_attention(query, keys, values, self.mask))
        return output

    def _rows(self, key: Tensor, value: Tensor) -> Tensor:
        key, value = (split_heads(x, self.model.config.head_dim) for x in (key, value))
        return torch.stack((self._rotate(key), value))

    def _rotate(self, x: Tensor) -> Tensor:
        return rotate(x, self.cos, self.sin, self.model.config.rotary_pairs)


def blend(melt: Tensor, looplm: Tensor, alpha: float) -> Tensor:
    """Return ``alpha melt + (1 - alpha) looplm``; with alpha 0 or 1 exactly one of them."""
    if alpha in (0.0, 1.0):
        return melt if alpha else looplm
    return alpha * melt + (1 - alpha) * looplm


def _see_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Forward pre-hook of Attention(x, kv, attend) that stores x, the layer's normed input, in ``attend.seen``."""
    layer: Any = module.layer
    x, _, attend = inputs
    attend.seen[layer] = x


class ChunkedForward:
    """Forward of one batch of sequences through a MELT, chunk by chunk.

    ``alpha`` is MELT's share in keys and values. ``checkpointing`` keeps only the inputs of each loop and computes the
    loop again in the backward pass. Memory for gradients per sequence: with checkpointing about T * N latents, keys and
    values of every token; without it every intermediate of every loop, and a copy of all past keys and values per chunk
    and loop.
    """

    def __init__(
        self,
        model: MeltModel,
        num_loops: int,
        *,
        alpha: float = 1.0,
        checkpointing: bool = False,
        start: Start = DEFAULT_START,
    ):
        self.model, self.num_loops, self.alpha, self.checkpointing = model, num_loops, alpha, checkpointing
        self.start, self.length = start, 0
        # The earlier chunks' keys and values in the stages that run once per token.
        self.once: dict[str, list[Tensor]] = {"prelude": [], "coda": []}
        # past[t]: the earlier chunks' keys and values that loop t reads. At alpha = 1 all loops read the same ones.
        self.past: list[list[Tensor]] = [[] for _ in range(num_loops if alpha < 1 else 1)]

    def run(self, embeddings: Tensor, num_loops: int | None = None) -> ChunkStates:
        """Run the next chunk and keep its keys and values. embeddings: (batch, chunk, d).

        ``num_loops`` below the usual number lets this chunk leave early, at alpha = 1 only. Raises ValueError.
        """
        loops = self.num_loops if num_loops is None else num_loops
        if self.alpha < 1 and loops != self.num_loops:
            raise ValueError("a chunk can only leave early at alpha = 1: LoopLM's rows are needed for every loop")
        batch, chunk, _ = embeddings.shape
        config = self.model.config
        attend = self._once("prelude", chunk)
        injected = self.model.prelude(embeddings, attend)
        self._keep("prelude", attend)
        hidden = self.model.start(injected, attend.positions[None], *self.start)
        latent = hidden.new_zeros(config.num_hidden_layers, batch, chunk, config.latent_size)
        hiddens, reads, exits, outputs, loop_rows = [], [], [], [], []
        rows = hidden
        for loop in range(loops):
            arguments = (hidden, injected, latent, loop, self.length)
            if self.checkpointing:
                result = checkpoint(self._loop, *arguments, *self._past(loop), use_reentrant=False)
            else:
                result = self._loop(*arguments, *self._past(loop))
            hidden, latent, exit_probability, attention, rows, own = result
            attend = self._once("coda", chunk)
            hiddens.append(hidden)
            reads.append(self.model.coda(hidden, attend))
            exits.append(exit_probability)
            outputs.append(attention)
            loop_rows.append(own)
        for loop, past in enumerate(self.past):
            past.append(blend(rows, loop_rows[loop], self.alpha))
        self._keep("coda", attend)
        self.length += chunk
        probability = torch.stack(exits) if config.exit_gate else None
        return ChunkStates(torch.stack(hiddens), torch.stack(reads), probability, torch.stack(outputs))

    def cut(self) -> None:
        """Stop gradients at the chunks so far."""
        self.past = [[rows.detach() for rows in past] for past in self.past]
        self.once = {stage: [rows.detach() for rows in past] for stage, past in self.once.items()}

    def _once(self, stage: str, chunk: int) -> _ChunkAttention:
        layers: Any = getattr(self.model, f"{stage}_layers")
        return _ChunkAttention(self.model, len(layers), self.once[stage], self.length, chunk)

    def _keep(self, stage: str, attend: _ChunkAttention) -> None:
        if attend.rows:
            self.once[stage].append(torch.stack(attend.rows, dim=1))

    def _past(self, loop: int) -> list[Tensor]:
        return self.past[loop if self.alpha < 1 else 0]

    def _loop(
        self, hidden: Tensor, injected: Tensor, latent: Tensor, loop: int, start: int, *past: Tensor
    ) -> tuple[Any, ...]:
        batch, chunk, _ = hidden.shape
        attend = _ChunkAttention(self.model, len(self.model.layers), past, start, chunk, self.alpha)
        first = torch.full((batch,), loop == 0, device=hidden.device)
        active = torch.ones(batch, chunk, dtype=torch.bool, device=hidden.device)
        with _seeing_inputs(self.model, self.alpha < 1):
            step = self.model.loop_step(hidden, latent, first, active, attend, injected)
        rows = torch.stack(attend.rows, dim=1)
        own = torch.stack(attend.loop_rows, dim=1) if self.alpha < 1 else rows
        return step.hidden, step.latent, step.exit_probability, torch.stack(attend.outputs), rows, own


@contextmanager
def _seeing_inputs(model: MeltModel, wanted: bool) -> Iterator[None]:
    layers: Any = model.layers if wanted else ()
    handles = [layer.self_attn.register_forward_pre_hook(_see_input) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TeacherForward:
    """Forward of a frozen LoopLM over the same chunks, without gradients.

    It equals its forward over the whole sequence. Each loop has a coda of its own, as if all tokens left after it.
    """

    def __init__(self, teacher: LoopLMForCausalLM, num_loops: int, start: Start = DEFAULT_START):
        self.teacher, self.num_loops, self.start = teacher, num_loops, start
        self.cache, self.codas, self.length = DynamicCache(), [DynamicCache() for _ in range(num_loops)], 0

    @torch.no_grad()
    def run(self, input_ids: Tensor) -> ChunkStates:
        """Run the next chunk. input_ids: (batch, chunk).

        In the states that are returned, ``exit_probability`` holds the exit distribution.
        """
        outputs: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            outputs.append(inputs[0])

        model, (batch, chunk) = self.teacher.model, input_ids.shape
        self.length += chunk
        mask = causal_mask(torch.ones(batch, self.length, dtype=torch.bool, device=input_ids.device), chunk)
        positions = torch.arange(self.length - chunk, self.length, device=input_ids.device).expand(batch, -1)
        layers: Any = model.layers
        handles = [layer.self_attn.o_proj.register_forward_pre_hook(keep) for layer in layers]
        try:
            embeddings = model.embed_tokens(input_ids)
            hidden, exits = model.run(embeddings, mask, positions, self.cache, self.num_loops, self.start)
        finally:
            for handle in handles:
                handle.remove()
        attention = torch.stack(outputs).unflatten(0, (self.num_loops, len(layers)))
        reads = [model.read(one, mask, positions, coda) for one, coda in zip(hidden, self.codas, strict=True)]
        leaving = None if exits is None else exit_distribution(exits)
        return ChunkStates(hidden, torch.stack(reads), leaving, attention)
