"""Configurations of both looped models: transformers classes with the field names of published checkpoints."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .errors import shown

# RoPE variants whose tables do not depend on the length of the sequence.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
NORM_LAYOUTS = ("sandwich", "pre")
LATENT_INITS = ("first_input", "zeros")
AGGREGATIONS = ("gate", "scalar_gate", "mean", "ema", "last")
COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "total_ut_steps",
    "chunk_size",
)
_OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# ONNX operators hold sizes and positions in 32 bits.
MOST = 2**31 - 1
# Loops per token. Requests, packages and sessions have the same bound: each loop runs all layers.
MOST_LOOPS = 1024


def check_fields(values: Mapping[str, object]) -> None:
    """Check type and range of counts and token ids, before anything is computed from them.

    Works on every kind of config; an absent field gets its default later. Raises ValueError naming the field.
    """
    for field in COUNTS:
        value: Any = values.get(field, 1)
        most = MOST_LOOPS if field == "total_ut_steps" else MOST
        if value is None and field in _OPTIONAL_COUNTS:
            continue
        if not (_is_whole(value) and 1 <= value <= most):
            raise ValueError(f"{field} is {shown(value)}; it must be a whole number from 1 to {most}")
    for field in _TOKEN_IDS:
        value = values.get(field)
        ids = value if isinstance(value, list) and field == "eos_token_id" else [] if value is None else [value]
        least = 0 if field == "eos_token_id" else -1  # a pad_token_id of -1 means none
        if not all(_is_whole(one) and least <= one <= MOST for one in ids):
            whole = "a token id or a list of them" if field == "eos_token_id" else "a token id"
            raise ValueError(f"{field} is {shown(value)}; it must be {whole}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@strict
class LoopedConfig(PreTrainedConfig):
    """Common fields of LoopLM and MELT: a decoder stack that runs ``total_ut_steps`` times per token.

    ``norm_layout`` is ``"sandwich"`` (Ouro: a norm before and after each sub-layer) or ``"pre"`` (Llama: before only).
    ``head_dim`` and ``num_key_value_heads`` may be absent, as in published configs.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 49152
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    # Absent (None) in many published configs; __post_init__ fills them in.
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
        for name, rope in (("rope_parameters", self.rope_parameters), ("rope_scaling", kwargs.get("rope_scaling"))):
            if not isinstance(rope, dict | None):
                raise ValueError(f"{name} is {shown(rope)}; it must be an object")
        # Set before super() runs: transformers folds the checkpoint's own RoPE keys into rope_parameters.
        kwargs.setdefault("rope_theta", self.default_theta)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError, in one sentence, for a model that cannot be built."""
        check_fields({field: getattr(self, field) for field in (*COUNTS, *_TOKEN_IDS) if hasattr(self, field)})
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act {shown(self.hidden_act)} is not supported; only 'silu' is")
        if self.norm_layout not in NORM_LAYOUTS:
            raise ValueError(f"norm_layout {shown(self.norm_layout)} is not one of {', '.join(NORM_LAYOUTS)}")
        _number("rms_norm_eps", self.rms_norm_eps, above=0.0)
        _number("initializer_range", self.initializer_range)
        _number("early_exit_threshold", self.early_exit_threshold)
        if not 0 <= self.early_exit_threshold <= 1:
            raise ValueError(f"early_exit_threshold is {self.early_exit_threshold!r}; it must lie between 0 and 1")
        if getattr(self, "use_sliding_window", False):
            raise ValueError("use_sliding_window is set; attention over a sliding window is not supported")
        if getattr(self, "quantization_config", None) is not None:
            raise ValueError("quantization_config is set; quantized checkpoints are not supported")
        self._validate_rope()

    def _validate_rope(self) -> None:
        rope = self.rope_parameters
        if rope.get("rope_type") not in STATIC_ROPE_TYPES:
            raise ValueError(
                f"rope_scaling of type {rope.get('rope_type')!r} is not supported; "
                f"supported are {', '.join(STATIC_ROPE_TYPES)}"
            )
        for name in ("rope_theta", "factor", "original_max_position_embeddings"):
            if name in rope:
                _number(name, rope[name], above=0.0)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor other than 1 is not supported")


def _number(name: str, value: object, above: float = -math.inf) -> None:
    """Raise ValueError unless ``value`` is a finite number above ``above``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # math.isfinite raises OverflowError for a whole number of hundreds of digits.
    if not number or value <= above or not abs(value) <= sys.float_info.max:  # type: ignore[operator, arg-type]
        more = f" above {above:g}" if math.isfinite(above) else ""
        raise ValueError(f"{name} is {shown(value)}; it must be a finite number{more}")


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
    """MELT (arXiv 2605.07721): a LoopLM with one key/value cache per layer, shared by all loops.

    - ``chunk_size``: number of prompt tokens that run their loops together. It changes the model's results: tokens of
      one chunk see each other's keys and values of the same loop, and those of earlier chunks as their last loop left
      them.
    - ``latent_init``: the latent before the first loop: ``"first_input"`` (loop 1 equals LoopLM's) or ``"zeros"``.
    - ``aggregation``: how a token's inputs over the loops become its latent: MELT's element-wise ``"gate"``, or an
      alternative of its ablation (see ``aggregation.py``). ``ema_weight`` is the new input's share under ``"ema"``.
    - ``untrained``: parts that a conversion initialised and nobody trained ("latent_gate", "early_exit_gate").
    """

    model_type: ClassVar[str] = "melt"

    chunk_size: int = 128
    latent_init: str = "first_input"
    aggregation: str = "gate"
    ema_weight: float = 0.2
    untrained: list[str] | tuple[str, ...] = ()

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if self.latent_init not in LATENT_INITS:
            raise ValueError(f"latent_init {shown(self.latent_init)} is not one of {', '.join(LATENT_INITS)}")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation {shown(self.aggregation)} is not one of {', '.join(AGGREGATIONS)}")
        _number("ema_weight", self.ema_weight, above=0.0)
        if self.ema_weight > 1:
            raise ValueError(f"ema_weight is {self.ema_weight!r}; it must be above 0 and at most 1")

    @property
    def latent_size(self) -> int:
        """Elements of a token's latent in one layer: d, or d + 1 for the mean, which counts its loops."""
        return self.hidden_size + (self.aggregation == "mean")

    @property
    def gate_starts_at_input(self) -> bool:
        """Whether a gated token's first latent is its input, h_1 = a_1, so that the first loop needs no gate."""
        return self.aggregation in ("gate", "scalar_gate") and self.latent_init == "first_input"
