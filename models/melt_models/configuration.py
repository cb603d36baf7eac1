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
NORM_LAYOUTS = ("sandwich", "pre", "norm_of_sum", "post_branch")
INJECTIONS = ("none", "linear")
ROTARY_PAIRS = ("halves", "adjacent")
START_STATES = ("embedding", "noise", "zeros")
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
_COUNTS_FROM_ZERO = ("num_prelude_layers", "num_coda_layers")
_OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# ONNX operators hold sizes and positions in 32 bits.
MOST_COUNT = 2**31 - 1
# Loops per token. Requests, packages and sessions have the same bound: each loop runs all layers.
MOST_LOOPS = 1024


def check_fields(values: Mapping[str, object]) -> None:
    """Check type and range of counts and token ids, before anything is computed from them.

    Works on every kind of config; an absent field gets its default later. Raises ValueError naming the field.
    """
    for field in (*COUNTS, *_COUNTS_FROM_ZERO):
        value: Any = values.get(field, 1)
        least = 0 if field in _COUNTS_FROM_ZERO else 1
        most = MOST_LOOPS if field == "total_ut_steps" else MOST_COUNT
        if value is None and field in _OPTIONAL_COUNTS:
            continue
        if not (_is_whole(value) and least <= value <= most):
            raise ValueError(f"{field} is {shown(value)}; it must be a whole number from {least} to {most}")
    for field in _TOKEN_IDS:
        value = values.get(field)
        ids = value if isinstance(value, list) and field == "eos_token_id" else [] if value is None else [value]
        least = 0 if field == "eos_token_id" else -1  # a pad_token_id of -1 means none
        if not all(_is_whole(one) and least <= one <= MOST_COUNT for one in ids):
            whole = "a token id or a list of them" if field == "eos_token_id" else "a token id"
            raise ValueError(f"{field} is {shown(value)}; it must be {whole}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tell_peft(model_type: str) -> None:
    """If PEFT is loaded, let it adapt the layers that it adapts in a Llama: they have the same names here."""
    constants = sys.modules.get("peft.utils.constants")
    for name, layers in vars(constants).items() if constants else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(layers, dict) and "llama" in layers:
            layers.setdefault(model_type, layers["llama"])


@strict
class LoopedConfig(PreTrainedConfig):
    """Common fields of all looped models: a core of ``num_hidden_layers`` layers that runs ``total_ut_steps`` times.

    The defaults are Ouro's. ``head_dim`` and ``num_key_value_heads`` may be absent, as in published configs.

    - ``num_prelude_layers``, ``num_coda_layers``: layers that run once per token, before and after the loops.
    - ``injection``: what a loop reads beside its hidden state: nothing, or with ``"linear"`` the prelude's output, by a
      linear layer over both.
    - ``norm_between_loops``: whether the final norm follows every loop, or only the last.
    - ``norm_before_coda``: whether the final norm also stands between the last loop and the coda.
    - ``norm_layout``: where a layer has norms: ``"sandwich"`` (Ouro: before and after each sub-layer), ``"pre"``
      (Llama: before), ``"norm_of_sum"`` (Huginn: before, and of the residual sum), ``"post_branch"`` (OLMo: after).
    - ``qk_norm``: RMS norm of the whole query and the whole key. ``qk_bias``: a bias of query and key projections.
    - ``rotary_pairs``: RoPE turns elements i and i + head_dim / 2 (``"halves"``), or 2 i and 2 i + 1 (``"adjacent"``).
    - ``embedding_scale``: factor of the token embeddings.
    - ``start_state``: the hidden state before the first loop: ``"embedding"`` (the prelude's output), seeded
      ``"noise"`` of ``start_std`` (see ``start_state.py``), or ``"zeros"``.
    - ``exit_gate``: whether the model has an exit gate. Without it there is no exit probability.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "hidden_states",
        "loop_hidden",
        "exit_probability",
        "exit_distribution",
        "depth",
    ]

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
    num_prelude_layers: int = 0
    num_coda_layers: int = 0
    injection: str = "none"
    norm_between_loops: bool = True
    norm_before_coda: bool = False
    qk_norm: bool = False
    qk_bias: bool = False
    rotary_pairs: str = "halves"
    embedding_scale: float = 1.0
    start_state: str = "embedding"
    start_std: float = 0.0
    exit_gate: bool = True
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

    def to_dict(self) -> dict[str, Any]:
        _tell_peft(self.model_type)  # PEFT reads the config here before it looks for a model's layers
        return super().to_dict()

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
        for field, known in (
            ("norm_layout", NORM_LAYOUTS),
            ("injection", INJECTIONS),
            ("rotary_pairs", ROTARY_PAIRS),
            ("start_state", START_STATES),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} {shown(getattr(self, field))} is not one of {', '.join(known)}")
        _number("rms_norm_eps", self.rms_norm_eps, above=0.0)
        _number("initializer_range", self.initializer_range)
        _number("embedding_scale", self.embedding_scale)
        _number("start_std", self.start_std)
        if self.start_std < 0:
            raise ValueError(f"start_std is {self.start_std!r}; it must be 0 or more")
        _number("early_exit_threshold", self.early_exit_threshold)
        if not self.exit_gate and self.early_exit_threshold != 1:
            raise ValueError(
                f"early_exit_threshold is {shown(self.early_exit_threshold)}, but the model has no exit gate and so no "
                "exit probability"
            )
        if not 0 <= self.early_exit_threshold <= 1:
            raise ValueError(f"early_exit_threshold is {self.early_exit_threshold!r}; it must lie between 0 and 1")
        if getattr(self, "use_sliding_window", False):
            raise ValueError("use_sliding_window is set; attention over a sliding window is not supported")
        if getattr(self, "quantization_config", None) is not None:
            raise ValueError("quantization_config is set; quantized checkpoints are not supported")
        self._validate_rope()

    @property
    def norm_after_coda(self) -> bool:
        """Whether the final norm follows the coda: not if it followed the last loop and there are no coda layers."""
        return not self.norm_between_loops or self.num_coda_layers > 0

    def first_cache(self, stage: str, loop: int = 0) -> int:
        """Return the number of the first cache of "prelude", "coda" or "core": their order in a cache of the model.

        ``loop`` counts from 0, where every loop has caches of its own.
        """
        once = self.num_prelude_layers + self.num_coda_layers
        first = {"prelude": 0, "coda": self.num_prelude_layers, "core": once}[stage]
        return first + loop * self.num_hidden_layers

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
