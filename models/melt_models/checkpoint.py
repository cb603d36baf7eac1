"""Strict reading of checkpoint directories: all expected tensors are there, no others are, and all values are
finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import LlamaConfig, PreTrainedConfig

from .configuration import LoopLMConfig, MeltConfig, check_fields
from .directory import check_directory
from .errors import CheckpointError, UnsupportedConfigError, shown
from .families.huginn import HuginnConfig, HuginnForCausalLM
from .families.nanbeige import NanbeigeConfig, NanbeigeForCausalLM
from .families.published import PublishedConfig
from .loading import (
    CONFIG_ERRORS,
    check_sizes,
    check_tensors,
    expected_shapes,
    innermost,
    load_weights,
    on_meta,
    own_fields,
)
from .looplm import LoopLMForCausalLM
from .melt import MeltForCausalLM
from .tensors import MOST_TOKENIZER_BYTES, WEIGHT_DTYPES, StoredTensor, Weights, read_json

__all__ = [
    "CONFIG_ERRORS",
    "MOST_TOKENIZER_BYTES",
    "WEIGHT_DTYPES",
    "StoredTensor",
    "Weights",
    "check_sizes",
    "check_tensors",
    "expected_shapes",
    "innermost",
    "load_weights",
    "read_json",
]

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "ouro": LoopLMConfig,
    "melt": MeltConfig,
    "llama": LlamaConfig,
    "nanbeige": NanbeigeConfig,
    "huginn_raven": HuginnConfig,
}
LoopedModel: TypeAlias = LoopLMForCausalLM | MeltForCausalLM
MODELS: dict[str, Any] = {
    "ouro": LoopLMForCausalLM,
    "melt": MeltForCausalLM,
    "nanbeige": NanbeigeForCausalLM,
    "huginn_raven": HuginnForCausalLM,
}
# Fields that are read beside those of the configuration's class: the rotary embedding, and fields that are refused by
# name. Others are dropped: transformers would act on some of them (it makes ``num_labels`` labels).
_BESIDES = {
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
    "quantization_config",
}


def read_config(directory: Path) -> PreTrainedConfig:
    """Read the configuration of a looped model's or Llama's checkpoint directory. Raises CheckpointError."""
    check_directory(directory)
    path = directory / "config.json"
    content = read_json(path)
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIGS:
        raise UnsupportedConfigError(
            f"{path} has model_type {shown(model_type)}; supported are {', '.join(repr(name) for name in CONFIGS)}"
        )
    kind = CONFIGS[model_type]
    read = own_fields(kind) | _BESIDES
    try:
        if issubclass(kind, PublishedConfig):
            content = kind.translated(content, directory)
        check_fields(content)
        config = kind.from_dict({name: value for name, value in content.items() if name in read})
        config.validate()
    except CONFIG_ERRORS as error:
        if isinstance(error, CheckpointError) and not isinstance(error, UnsupportedConfigError):
            raise  # about the tensors, which a family's config is read with
        raise UnsupportedConfigError(f"{path}: {innermost(error)}") from error
    return config


def check_looped(config: PreTrainedConfig) -> None:
    """Raise UnsupportedConfigError for a config that is not of a looped model, such as Llama's."""
    if config.model_type not in MODELS:
        raise UnsupportedConfigError(
            f"model_type {config.model_type!r} is not a looped model; run melt-convert on the checkpoint first"
        )


def meta_model(config: PreTrainedConfig) -> LoopedModel:
    """Build a model on PyTorch's meta device, without memory for weights, in evaluation mode.

    Raises UnsupportedConfigError.
    """
    check_looped(config)
    model: LoopedModel = on_meta(MODELS[config.model_type], config)
    return model


def open_weights(directory: Path, config: PreTrainedConfig) -> Weights:
    """Open the weights of a checkpoint of this configuration, under the names of this package's models.

    A family's own layout is checked. Raises CheckpointError.
    """
    weights = Weights(directory)
    if not isinstance(config, PublishedConfig) or config.is_own_layout(weights):
        return weights
    check_sizes(config, weights)
    return config.rename(weights, expected_shapes(meta_model(config)))


def open_checkpoint(directory: Path) -> tuple[LoopedModel, Weights]:
    """Return a model on the meta device and its weights, names and shapes checked. Raises CheckpointError."""
    config = read_config(directory)
    check_looped(config)
    weights = open_weights(directory, config)
    check_sizes(config, weights)
    model = meta_model(config)
    check_tensors(weights, expected_shapes(model), tied=config.tie_word_embeddings)
    return model, weights


def load_model(directory: Path | str, dtype: torch.dtype | None = None) -> LoopedModel:
    """Load a looped model from a checkpoint directory, in evaluation mode.

    With ``dtype`` None the weights get the narrowest type that can hold the values of all tensors; if they all have one
    type, they stay memory-mapped. Raises CheckpointError.
    """
    model, weights = open_checkpoint(Path(directory))
    model = load_weights(model, weights, dtype or weights.dtype)
    return model
