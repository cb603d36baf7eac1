"""Configurations of the two looped models, as transformers classes with the checkpoints' own field names."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# RoPE variants whose tables do not depend on how long the sequence has grown.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
NORM_LAYOUTS = ("sandwich", "pre")
LATENT_INITS = ("first_input", "zeros")


@strict
class LoopedConfig(PreTrainedConfig):
    """What LoopLM and MELT have in common: a decoder stack that is run ``total_ut_steps`` times a token.

    ``norm_layout`` is ``"sandwich"`` (Ouro: a norm before and after each sub-layer) or ``"pre"`` (Llama: before
    only). ``head_dim`` and ``num_key_value_heads`` may be absent, as in published configs.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 49152
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    # Absent (None) in many published configs; whole numbers once the configuration is built.
    num_key_value_heads: Any = None
    head_dim: Any = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 65536
    rms_norm_eps: float = 1e-6
    rope_parameters: Any = None
    tie_word_embeddings: bool = False
    total_ut_steps: int = 4
    early_exit_threshold: float = 1.0
    norm_layout: str = "sandwich"
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    default_theta = 1_000_000.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        # The checkpoint's own RoPE keys, before transformers folds them into rope_parameters.
        kwargs.setdefault("rope_theta", self.default_theta)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuses what cannot be built. Raises ValueError with one clear sentence."""
        positive = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim max_position_embeddings total_ut_steps"
        )
        for field in positive.split():
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; a looped model needs 1 or more")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported; only 'silu' is")
        if self.norm_layout not in NORM_LAYOUTS:
            raise ValueError(f"norm_layout {self.norm_layout!r} is not one of {', '.join(NORM_LAYOUTS)}")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps}; it must be above 0")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in STATIC_ROPE_TYPES:
            raise ValueError(
                f"rope_scaling of type {rope_type!r} is not supported; supported are {', '.join(STATIC_ROPE_TYPES)}"
            )
        if (self.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor other than 1 is not supported")


@strict
class LoopLMConfig(LoopedConfig):
    """Ouro's configuration (``model_type: ouro``). Source: arXiv 2510.25741 and the published config files."""

    model_type: ClassVar[str] = "ouro"

    early_exit_step: int | None = None

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if self.early_exit_step is not None and not 0 <= self.early_exit_step < self.total_ut_steps:
            raise ValueError(f"early_exit_step is {self.early_exit_step}; total_ut_steps is {self.total_ut_steps}")


@strict
class MeltConfig(LoopedConfig):
    """MELT (arXiv 2605.07721): a LoopLM with one key/value cache a layer, shared by all loops.

    - ``chunk_size``: how many tokens of a prompt run their loops together. It is part of the model's meaning: tokens
      of one chunk see each other's rows of the same loop, and earlier chunks' rows as their last loop left them.
    - ``latent_init``: the latent before the first loop: ``"first_input"`` (loop 1 equals LoopLM's) or ``"zeros"``.
    - ``untrained``: parts that a conversion initialised and nobody trained ("latent_gate", "early_exit_gate").
    """

    model_type: ClassVar[str] = "melt"

    chunk_size: int = 128
    latent_init: str = "first_input"
    untrained: list[str] | tuple[str, ...] = ()

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size is {self.chunk_size}; it must be 1 or more")
        if self.latent_init not in LATENT_INITS:
            raise ValueError(f"latent_init {self.latent_init!r} is not one of {', '.join(LATENT_INITS)}")
