"""Looped models with one key/value cache per layer and loop: LoopLM (Ouro, arXiv 2510.25741) and the other families.

The mathematics is ``core.py``'s. These models are what MELT is converted and taught from.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .causal_lm import LoopedForCausalLM, LoopedOutput, every_state
from .configuration import LoopLMConfig
from .core import DEFAULT_START, LoopedCore, Start, check_exit
from .layers import (
    Attend,
    leave_early,
    masked_attention,
    merge_heads,
    rotary_tables,
    rotate,
    split_heads,
)


class _LoopAttention:
    """Attends over the caches of one stage or loop, whose first one has the number ``first``."""

    def __init__(
        self, config: LoopLMConfig, cache: DynamicCache | None, positions: Tensor, mask: Tensor, *, writes: bool = True
    ):
        self.config, self.cache, self.mask, self.first, self.writes = config, cache, mask, 0, writes
        self.cos, self.sin = rotary_tables(config, positions)

    def at(self, stage: str, loop: int = 0) -> _LoopAttention:
        """Go to the caches of a stage."""
        self.first = self.config.first_cache(stage, loop)
        return self

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (split_heads(x, self.config.head_dim) for x in (query, key, value))
        query, key = (rotate(x, self.cos, self.sin, self.config.rotary_pairs) for x in (query, key))
        keys, values = self._extended(self.first + layer, key, value)
        return merge_heads(masked_attention(query, keys, values, self.mask))

    def _extended(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return a cache's keys and values with the new ones, which it keeps if ``writes``."""
        if self.cache is None:
            return key, value
        if self.writes:
            return self.cache.update(key, value, index)
        slot: Any = self.cache.layers[index] if index < len(self.cache) else None
        if slot is None or not slot.is_initialized:
            return key, value
        return torch.cat((slot.keys, key), dim=2), torch.cat((slot.values, value), dim=2)

    def repeatable(self) -> _LoopAttention:
        made = copy(self)  # keeps the caches of this stage or loop
        made.writes = False
        return made


@dataclass
class LoopLMOutput(CausalLMOutputWithPast):
    """Output of the forward.

    - ``logits``: (batch, tokens, vocab), of the loop that was chosen.
    - ``loop_hidden``: (loops, batch, tokens, d), the hidden state after every loop, which the coda reads.
    - ``exit_distribution``: (loops, batch, tokens); None for a model without an exit gate.
    - ``depth``: (batch, tokens), the loop whose output the head read, counted from 1.
    - ``hidden_states``, if asked for: see ``LoopedOutput``.
    """

    loop_hidden: Tensor | None = None
    exit_distribution: Tensor | None = None
    depth: Tensor | None = None


class LoopLMModel(LoopedCore):
    """A looped core with caches of its own in every loop. As in Ouro, layer l of loop t uses cache t * layers + l.

    A model with a prelude or a coda has their caches before those.
    """

    config: LoopLMConfig

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        exit_at_step: int | None = None,
        exit_threshold: float | None = None,
        start_seed: int | Tensor = 0,
        start_state: str | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> LoopedOutput:
        """Run new tokens up to what the head reads. The arguments are those of ``LoopLMForCausalLM.forward``."""
        embeddings = self.embedded(input_ids, inputs_embeds)
        batch, new, _ = embeddings.shape
        num_loops = self.config.total_ut_steps if num_loops is None else num_loops
        if num_loops < 1:
            raise ValueError(f"num_loops is {num_loops}; it must be 1 or more")
        start = Start.checked(self.config, start_seed, start_state)
        check_exit(self.config, 1.0 if exit_threshold is None else exit_threshold)
        cached = self.caches(use_cache)
        cache = DynamicCache() if past_key_values is None and cached else past_key_values
        length = 0 if cache is None else cache.get_seq_length()
        # A cache counts its layers as they come, and tokens that ran fewer loops are missing from the later ones.
        if length and cache.get_seq_length(self.config.first_cache("core", num_loops) - 1) < length:  # type: ignore[union-attr]
            raise ValueError(f"the cache holds fewer than {num_loops} loops; a LoopLM cannot deepen a cache it filled")
        total = length + new
        if attention_mask is None:
            attention_mask = torch.ones(batch, total, dtype=torch.bool, device=embeddings.device)
        if attention_mask.shape != (batch, total):
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}; for the tokens of cache and input it is "
                f"{(batch, total)}"
            )
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        mask = causal_mask(attention_mask, new)
        loop_hidden, exits = self.run(embeddings, mask, position_ids, cache, num_loops, start)

        depth = self._depth(loop_hidden, exits, exit_at_step, exit_threshold)
        index = (depth - 1)[None, ..., None].expand(1, -1, -1, embeddings.shape[-1])
        read = self.read(loop_hidden.gather(0, index)[0], mask, position_ids, cache)
        return LoopedOutput(
            last_hidden_state=read,  # type: ignore[arg-type]
            past_key_values=cache if cached else None,
            hidden_states=every_state(embeddings, loop_hidden, read) if self.shows(output_hidden_states) else None,  # type: ignore[arg-type]
            depth=depth,
            loop_hidden=loop_hidden,
            exit_probability=exits,
        )

    def run(
        self,
        embeddings: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: DynamicCache | None,
        num_loops: int,
        start: Start = DEFAULT_START,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the prelude and ``num_loops`` loops. embeddings: (b, c, d); mask: (b, c, n) bool; positions: (b, c).

        Returns the hidden state (T, b, c, d) and the exit probability (T, b, c) of every loop; None without a gate.
        """
        attend = _LoopAttention(self.config, cache, positions, mask)
        injected = self.prelude(embeddings, attend.at("prelude"))
        hidden = self.start(injected, positions, *start)
        outputs: list[Tensor] = []
        exits: list[Tensor] = []
        for loop in range(num_loops):
            hidden, exit_probability = self.loop_step(hidden, attend.at("core", loop), injected)
            outputs.append(hidden)
            if exit_probability is not None:
                exits.append(exit_probability)
        return torch.stack(outputs), torch.stack(exits) if exits else None

    def loop_step(self, hidden: Tensor, attend: Attend, injected: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Run all layers of the core once. hidden, injected: (b, c, d); ``attend`` uses the caches of this loop.

        Returns the new hidden state (b, c, d) and the exit probability (b, c) in float32, None without a gate.
        """
        hidden, _, exit_probability = self.one_loop(hidden, attend, injected)
        return hidden, exit_probability

    def read(self, hidden: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None) -> Tensor:
        """Run the coda on the hidden state of the chosen loop, (b, c, d), kept."""
        return self.coda(hidden, _LoopAttention(self.config, cache, positions, mask).at("coda"))

    def _depth(
        self, loop_hidden: Tensor, exits: Tensor | None, exit_at_step: int | None, exit_threshold: float | None
    ) -> Tensor:
        """Return the loop whose output the head reads, (batch, tokens), counted from 1.

        loop_hidden: (loops, batch, tokens, d); exits: (loops, batch, tokens), the exit probabilities.
        """
        num_loops = len(loop_hidden)
        every = torch.full(loop_hidden.shape[1:3], num_loops, dtype=torch.long, device=loop_hidden.device)
        step = self.config.early_exit_step if exit_at_step is None else exit_at_step
        if step is not None:
            if not 0 <= step < num_loops:
                raise ValueError(f"exit_at_step is {step}; with {num_loops} loops it goes from 0 to {num_loops - 1}")
            return torch.full_like(every, step + 1)
        if exits is None:
            return every
        threshold = self.config.early_exit_threshold if exit_threshold is None else exit_threshold
        depth = every
        remaining = torch.ones_like(exits[0])
        for loop in range(num_loops - 1):
            remaining, leaves = leave_early(remaining, exits[loop], threshold)
            depth = torch.where(leaves & (depth == num_loops), loop + 1, depth)
        return depth


def exit_distribution(exit_probability: Tensor) -> Tensor:
    """Return p_t = lambda_t * prod_{j<t}(1 - lambda_j), where the last loop takes the remainder. Shape (loops, ...)
    kept."""
    stay = torch.cumprod(1.0 - exit_probability, dim=0)
    before = torch.cat((torch.ones_like(stay[:1]), stay[:-1]))
    return torch.cat((exit_probability[:-1] * before[:-1], before[-1:]))


def causal_mask(attention_mask: Tensor, new: int) -> Tensor:
    """Return which columns each of the last ``new`` columns attends to: its own, and earlier ones that are not padding.

    attention_mask: (b, all) -> (b, new, all) bool.
    """
    total = attention_mask.shape[1]
    column = torch.arange(total, device=attention_mask.device)
    row = column[total - new :, None]
    return ((column <= row) & attention_mask.bool()[:, None]) | (column == row)


class LoopLMForCausalLM(LoopedForCausalLM):
    """Ouro with a language-modelling head. ``checkpoint.load_model`` reads published Ouro directories."""

    config: LoopLMConfig
    config_class = LoopLMConfig
    core_class = LoopLMModel

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_loops: int | None = None,
        exit_at_step: int | None = None,
        exit_threshold: float | None = None,
        start_seed: int | Tensor = 0,
        start_state: str | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> LoopLMOutput:
        """Run new tokens (batch, tokens) after those in the cache.

        All loops run; the exit only chooses the loop whose output the head reads, as in Ouro's released code.
        ``exit_at_step`` counts from 0 and overrides ``exit_threshold``; both default to the config. For a model that
        starts from noise, ``start_seed`` is its seed, for all sequences or (batch,), and ``start_state="zeros"``
        replaces it. Raises ValueError for fewer than one loop, for an ``exit_at_step`` beyond the loops, and for an
        ``exit_threshold`` of a model without an exit gate.
        """
        read = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            num_loops=num_loops,
            exit_at_step=exit_at_step,
            exit_threshold=exit_threshold,
            start_seed=start_seed,
            start_state=start_state,
            output_hidden_states=output_hidden_states,
        )
        exits = read.exit_probability
        return LoopLMOutput(
            **self.said(read, labels, logits_to_keep, kwargs),
            loop_hidden=read.loop_hidden,
            exit_distribution=None if exits is None else exit_distribution(exits),
            depth=read.depth,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> bool:
        """Give generate() a cache that grows on use: a LoopLM needs an entry per layer and loop."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = DynamicCache()
        return True


AutoConfig.register("ouro", LoopLMConfig, exist_ok=True)
AutoModelForCausalLM.register(LoopLMConfig, LoopLMForCausalLM, exist_ok=True)
