"""From a configuration and checked tensors to a model, whatever its family."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .errors import CheckpointError, UnsupportedConfigError
from .layers import rotary_tables
from .tensors import Weights, check_names

# Errors that transformers and PyTorch raise for a configuration with untrusted values.
CONFIG_ERRORS = (
    StrictDataclassError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    ImportError,
    RuntimeError,
)
_MOST_LAYERS = 1024  # each takes a millisecond and some kilobytes to build, even if its tensors have no values
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def own_fields(kind: type[PreTrainedConfig]) -> set[str]:
    """Return the fields that a configuration class adds to those of every transformers model."""
    own = [base for base in kind.__mro__ if issubclass(base, PreTrainedConfig) and base is not PreTrainedConfig]
    named = {name for base in own for name in inspect.get_annotations(base)}
    return named & {field.name for field in fields(kind)}


def innermost(error: BaseException) -> str:
    """Return the message at the bottom of a chain of wrapped validation errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def check_sizes(config: PreTrainedConfig, weights: Weights) -> None:
    """Check that the config's sizes fit the stored tensors, before a model of these sizes is built.

    A small checkpoint may ask for any number of layers. Also computes the rotary embedding once. Raises
    CheckpointError.
    """
    path = weights.directory / "config.json"
    once = (getattr(config, name, 0) for name in ("num_prelude_layers", "num_coda_layers"))
    layers = config.num_hidden_layers + sum(once)
    if layers > len(weights):
        raise CheckpointError(f"{path} asks for {layers} layers; the checkpoint has only {len(weights)} tensors")
    if layers > _MOST_LAYERS:
        raise CheckpointError(f"{path} asks for {layers} layers; {_MOST_LAYERS} are read at most")
    stored = sum(math.prod(tensor.shape) for tensor in weights.values())
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    for sizes in (
        {"vocab_size": config.vocab_size},
        {"intermediate_size": config.intermediate_size},
        {"num_attention_heads": config.num_attention_heads, "head_dim": config.head_dim},
        {"num_key_value_heads": kv_heads, "head_dim": config.head_dim},
    ):
        asked = math.prod(sizes.values()) * config.hidden_size
        if asked > stored:
            named = ", ".join(f"{name} {size}" for name, size in {**sizes, "hidden_size": config.hidden_size}.items())
            raise CheckpointError(
                f"{path} asks for a tensor of {asked:,} values ({named}); all of the checkpoint's hold {stored:,}"
            )
    try:
        tables = rotary_tables(config, torch.tensor([config.max_position_embeddings - 1]))  # type: ignore[arg-type]
    except CONFIG_ERRORS as error:
        raise UnsupportedConfigError(f"{path}: the rotary embedding cannot be computed: {innermost(error)}") from error
    if not all(torch.isfinite(table).all() for table in tables):
        raise UnsupportedConfigError(f"{path}: the rotary embedding is not finite at the last position")


def on_meta(kind: Any, config: PreTrainedConfig) -> Any:
    """Build a model on PyTorch's meta device, without memory for weights, in evaluation mode.

    Raises UnsupportedConfigError.
    """
    try:
        with torch.device("meta"):
            return kind(config).eval()
    except CONFIG_ERRORS as error:
        raise UnsupportedConfigError(f"no model can be built from the config: {innermost(error)}") from error


def expected_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a model's checkpoint must hold (a tied head only once)."""
    tied = model.config.tie_word_embeddings
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if not (tied and name == HEAD)}


def check_tensors(weights: Weights, expected: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """Compare names and shapes with those that the model needs, and a tied head, if stored, with the embedding.

    Raises CheckpointError naming the first tensors at fault.
    """
    check_names(weights, expected, {HEAD} if tied else ())
    if tied and HEAD in weights and not torch.equal(weights.tensor(HEAD), weights.tensor(EMBEDDING)):
        raise CheckpointError(f"the config ties the embeddings, but {HEAD} differs from {EMBEDDING}")


def load_weights(model: Any, weights: Weights, dtype: torch.dtype | None = None) -> Any:
    """Give a model on the meta device its weights, each cast to ``dtype`` or (None) memory-mapped in its stored type.

    Returns the model. Raises CheckpointError.
    """
    state = {name: weights.tensor(name, dtype) for name in expected_shapes(model)}
    if model.config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, strict=True, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
