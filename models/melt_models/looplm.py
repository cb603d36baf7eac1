"""LoopLM (Ouro, arXiv 2510.25741), with one key/value cache per layer and loop: source of conversions and teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration import LoopLMConfig
from .layers import (
    Attend,
    DecoderLayer,
    RMSNorm,
    leave_early,
    masked_attention,
    merge_heads,
    rotary_tables,
    rotate,
    split_heads,
)


class _LoopAttention:
    """Attends over the caches of one loop. As in Ouro, layer l of loop t uses cache number ``t * layers + l``."""

    def __init__(self, config: LoopLMConfig, cache: DynamicCache, loop: int, cos: Tensor, sin: Tensor, mask: Tensor):
        self.config, self.cache, self.loop = config, cache, loop
        self.cos, self.sin, self.mask = cos, sin, mask

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (split_heads(x, self.config.head_dim) for x in (query, key, value))
        key = rotate(key, self.cos, self.sin)
        keys, values = self.cache.update(key, value, self.loop * self.config.num_hidden_layers + layer)
        return merge_heads(masked_attention(rotate(query, self.cos, self.sin), keys, values, self.mask))


class LoopLMLayer(DecoderLayer):
    """A decoder layer whose queries, keys and values all read the normed input."""

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Run the layer. x: (batch, chunk, d), kept."""
        a = self.input_layernorm(x)
        return self.attend_and_transform(x, a, a, attend)


@dataclass
class LoopLMOutput(CausalLMOutputWithPast):
    """Output of the forward.

    - ``logits``: (batch, tokens, vocab), of the loop that was chosen.
    - ``loop_hidden``: (loops, batch, tokens, d), the normed output of every loop.
    - ``exit_distribution``: (loops, batch, tokens).
    - ``depth``: (batch, tokens), the loop whose output the head read, counted from 1.
    """

    loop_hidden: Tensor | None = None
    exit_distribution: Tensor | None = None
    depth: Tensor | None = None


class LoopLMModel(nn.Module):
    """Embedding, the looped stack of layers, final norm and exit gate."""

    def __init__(self, config: LoopLMConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LoopLMLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)

    def forward(
        self, hidden: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, num_loops: int
    ) -> tuple[Tensor, Tensor]:
        """Run ``num_loops`` loops. hidden: (b, c, d) embeddings; mask: (b, c, n) bool; positions: (b, c).

        Returns the normed output (T, b, c, d) and the exit probability (T, b, c) of every loop.
        """
        cos, sin = rotary_tables(self.config, positions)
        outputs, exits = [], []
        for loop in range(num_loops):
            hidden, exit_probability = self.loop_step(hidden, _LoopAttention(self.config, cache, loop, cos, sin, mask))
            outputs.append(hidden)
            exits.append(exit_probability)
        return torch.stack(outputs), torch.stack(exits)

    def loop_step(self, hidden: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Run all layers and the final norm once. hidden: (b, c, d); ``attend`` uses the caches of this loop.

        Returns the normed output (b, c, d), which the next loop reads, and the exit probability (b, c) in float32.
        """
        for layer in self.layers:
            hidden = layer(hidden, attend)
        hidden = self.norm(hidden)
        return hidden, torch.sigmoid(self.early_exit_gate(hidden).squeeze(-1).float())


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


class LoopLMForCausalLM(PreTrainedModel, GenerationMixin):
    """Ouro with a language-modelling head. ``checkpoint.load_model`` reads published Ouro directories."""

    config: LoopLMConfig
    config_class = LoopLMConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = ["LoopLMLayer"]
    _supports_sdpa = True

    def __init__(self, config: LoopLMConfig):
        super().__init__(config)
        self.model = LoopLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_loops: int | None = None,
        exit_at_step: int | None = None,
        exit_threshold: float | None = None,
        **kwargs: Any,
    ) -> LoopLMOutput:
        """Run new tokens (batch, tokens) after those in the cache.

        All loops run; the exit only chooses the loop whose output the head reads, as in Ouro's released code.
        ``exit_at_step`` counts from 0 and overrides ``exit_threshold``; both default to the config. Raises ValueError
        for fewer than one loop, or for an ``exit_at_step`` beyond the loops.
        """
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, new, _ = hidden.shape
        num_loops = self.config.total_ut_steps if num_loops is None else num_loops
        if num_loops < 1:
            raise ValueError(f"num_loops is {num_loops}; it must be 1 or more")
        cache = DynamicCache() if past_key_values is None else past_key_values
        if 0 < len(cache) < num_loops * self.config.num_hidden_layers and cache.get_seq_length():
            raise ValueError(f"the cache holds fewer than {num_loops} loops; a LoopLM cannot deepen a cache it filled")
        total = cache.get_seq_length() + new
        if attention_mask is None:
            attention_mask = torch.ones(batch, total, dtype=torch.bool, device=hidden.device)
        if attention_mask.shape[1] != total:
            raise ValueError(f"attention_mask covers {attention_mask.shape[1]} tokens; cache and input hold {total}")
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        loop_hidden, exits = self.model(hidden, causal_mask(attention_mask, new), position_ids, cache, num_loops)

        depth = self._depth(exits, exit_at_step, exit_threshold)
        index = (depth - 1)[None, ..., None].expand(1, -1, -1, hidden.shape[-1])
        chosen = loop_hidden.gather(0, index)[0]
        logits = self.lm_head(chosen[:, -logits_to_keep:] if logits_to_keep else chosen)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return LoopLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache is not False else None,
            loop_hidden=loop_hidden,
            exit_distribution=exit_distribution(exits),
            depth=depth,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> bool:
        """Give generate() a cache that grows on use: LoopLM needs loops * layers entries."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = DynamicCache()
        return True

    def _depth(self, exits: Tensor, exit_at_step: int | None, exit_threshold: float | None) -> Tensor:
        """Return the loop whose output the head reads, (batch, tokens), counted from 1.

        exits: (loops, batch, tokens), the exit probabilities.
        """
        num_loops = exits.shape[0]
        step = self.config.early_exit_step if exit_at_step is None else exit_at_step
        if step is not None:
            if not 0 <= step < num_loops:
                raise ValueError(f"exit_at_step is {step}; with {num_loops} loops it goes from 0 to {num_loops - 1}")
            return torch.full_like(exits[0], step + 1, dtype=torch.long)
        threshold = self.config.early_exit_threshold if exit_threshold is None else exit_threshold
        depth = torch.full_like(exits[0], num_loops, dtype=torch.long)
        remaining = torch.ones_like(exits[0])
        for loop in range(num_loops - 1):
            remaining, leaves = leave_early(remaining, exits[loop], threshold)
            depth = torch.where(leaves & (depth == num_loops), loop + 1, depth)
        return depth


AutoConfig.register("ouro", LoopLMConfig, exist_ok=True)
AutoModelForCausalLM.register(LoopLMConfig, LoopLMForCausalLM, exist_ok=True)
