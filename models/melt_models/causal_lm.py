"""What transformers knows of every model here: the head over a looped core, its loss, and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration import LoopedConfig
from .core import LoopedCore
from .portable import PortableModel


@dataclass
class LoopedOutput(BaseModelOutputWithPast):
    """What a looped core returns for new tokens, before the head.

    - ``last_hidden_state``: (batch, tokens, d), what the head reads.
    - ``hidden_states``, if asked for: 1 + loops tensors (batch, tokens, d): the embedding, then the state after every
      loop. The last one is what the head reads. A token that left early keeps its state.
    - ``depth``: (batch, tokens), the loops of each token.
    - ``loop_hidden``: (loops, batch, tokens, d), the state after every loop, which the coda reads.
    - ``exit_probability``: (loops, batch, tokens); None for a model without an exit gate.
    """

    depth: Tensor | None = None
    loop_hidden: Tensor | None = None
    exit_probability: Tensor | None = None


def every_state(embedding: Tensor, loop_hidden: Tensor, read: Tensor) -> tuple[Tensor, ...]:
    """Return ``LoopedOutput.hidden_states``. loop_hidden: (loops, batch, tokens, d); the others (batch, tokens, d)."""
    return (embedding, *loop_hidden[:-1], read)


class LoopedForCausalLM(PortableModel, GenerationMixin):
    """A looped core with a language-modelling head."""

    base_model_prefix = "model"
    core_class: type[LoopedCore]
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = ["DecoderLayer"]
    _supports_sdpa = True

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.model: Any = self.core_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def said(
        self, read: LoopedOutput, labels: Tensor | None, logits_to_keep: int | Tensor, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Run the head, and return the fields of a CausalLMOutputWithPast.

        ``logits_to_keep``: the last so many positions, 0 for all, or the positions' indices.
        """
        whole: Any = read.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(whole[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return {
            "loss": loss,
            "logits": logits,
            "past_key_values": read.past_key_values,
            "hidden_states": read.hidden_states,
        }

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **options: Any
    ) -> None:
        """Let transformers set it, but never reentrant: that would cut the gradients from a chunk to earlier ones."""
        function: Any = gradient_checkpointing_func
        if isinstance(function, partial):
            function = partial(function, use_reentrant=False)
        if function is not None:
            options["gradient_checkpointing_func"] = function
        super()._set_gradient_checkpointing(enable=enable, **options)
