"""Strict reading of checkpoint directories: all expected tensors are there, no others are, and all values are
finite."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from .configuration import LoopLMConfig, MeltConfig, check_fields
from .directory import check_directory
from .errors import CheckpointError, UnsupportedConfigError, shown
from .layers import rotary_tables
from .looplm import LoopLMForCausalLM
from .melt import MeltForCausalLM

WEIGHT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONFIGS: dict[str, type[PreTrainedConfig]] = {"ouro": LoopLMConfig, "melt": MeltConfig, "llama": LlamaConfig}
LoopedModel: TypeAlias = LoopLMForCausalLM | MeltForCausalLM
MODELS: dict[str, Any] = {"ouro": LoopLMForCausalLM, "melt": MeltForCausalLM}
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
_MOST_JSON_BYTES = 1 << 24  # an index of 200,000 tensors; parsed, it takes up to 25 times as much memory
_MOST_NAME = 255  # characters of a file name
_MOST_LAYERS = 1024  # each takes a millisecond and some kilobytes to build, even if its tensors have no values
MOST_TOKENIZER_BYTES = 1 << 28  # several times the largest vocabularies of today
_MOST_VALUES = 6_000_000  # per file, three times those of the largest vocabularies; each takes up to 200 bytes
# Rotary tables and masks, which older checkpoints hold although they are computed from the config.
_DERIVED = re.compile(
    r"(^|\.)(rotary_emb\.\w+|(original_)?inv_freq|freqs_(cis|cos|sin)|(cos|sin)_cached"
    r"|((causal|attention|attn)_)?mask|masked_bias|position_ids)$"
)
_MASK = re.compile(r"(^|\.)(self_)?att(n|ention)\.bias$")  # GPT-2's causal mask, if it has four dimensions
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_json(path: Path, most: int = _MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of at most ``most`` bytes. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        if size > most:
            raise CheckpointError(f"{path} has {size:,} bytes; no JSON file of its kind is that large")
        text = path.read_text(encoding="utf-8")
        if sum(map(text.count, "[{,")) > _MOST_VALUES:
            raise CheckpointError(f"{path} has more than the {_MOST_VALUES:,} values that are read")
        content = json.loads(text, parse_int=_whole)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def _whole(digits: str) -> int:
    """Parse a whole number of at most 40 digits. Raises ValueError."""
    if len(digits) > 40:  # transformers writes "no limit" as a number of 31 digits
        raise ValueError(f"{digits[:20]}... is a whole number of {len(digits)} digits")
    return int(digits)


def read_config(directory: Path) -> PreTrainedConfig:
    """Read the configuration of a LoopLM ("ouro"), MELT or Llama checkpoint directory. Raises CheckpointError."""
    check_directory(directory)
    path = directory / "config.json"
    content = read_json(path)
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIGS:
        raise UnsupportedConfigError(
            f"{path} has model_type {shown(model_type)}; supported are {', '.join(repr(name) for name in CONFIGS)}"
        )
    read = _fields(CONFIGS[model_type]) | _BESIDES
    try:
        check_fields(content)
        config = CONFIGS[model_type].from_dict({name: value for name, value in content.items() if name in read})
        config.validate()
    except CONFIG_ERRORS as error:
        raise UnsupportedConfigError(f"{path}: {innermost(error)}") from error
    return config


def _fields(kind: type[PreTrainedConfig]) -> set[str]:
    """Return the fields that a configuration class adds to those of every transformers model."""
    own = [base for base in kind.__mro__ if issubclass(base, PreTrainedConfig) and base is not PreTrainedConfig]
    named = {name for base in own for name in inspect.get_annotations(base)}
    return named & {field.name for field in fields(kind)}


def innermost(error: BaseException) -> str:
    """Return the message at the bottom of a chain of wrapped validation errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


@dataclass(frozen=True)
class StoredTensor:
    """File, shape and type of a tensor on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(Mapping[str, StoredTensor]):
    """Mapping from the names of a checkpoint's tensors to their StoredTensor; values are read from disk on request.

    Reads single or sharded safetensors. Raises CheckpointError for files that cannot be read safely.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._tensors: dict[str, StoredTensor] = {}
        self._finite: set[str] = set()
        for file in self._files():
            self._read_header(file)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that can hold the values of all tensors."""
        widest = torch.float16 if self._tensors else torch.float32
        kinds = {stored.dtype for stored in self._tensors.values()}
        return kinds.pop() if len(kinds) == 1 else reduce(torch.promote_types, kinds, widest)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor memory-mapped in its stored type, or cast to ``dtype``. It is scanned when first read.

        Raises CheckpointError if it holds NaN or Inf, or values beyond the range of ``dtype``.
        """
        stored = self._tensors[name]
        with safe_open(stored.file, framework="pt") as handle:
            value = handle.get_tensor(name)
        if name not in self._finite:
            self._check_finite(name, value)
            self._finite.add(name)
        if dtype is None or dtype == stored.dtype:
            return value
        cast = value.to(dtype)
        if torch.promote_types(dtype, stored.dtype) != dtype and not torch.isfinite(cast).all():
            short = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{stored.file.name}: tensor {name} has values beyond the range of {short}")
        return cast

    def _check_finite(self, name: str, value: Tensor) -> None:
        # A finite sum has only finite terms. A sum that is not finite may have overflowed, so each term is checked.
        if not torch.isfinite(value.sum(dtype=torch.float32)) and not torch.isfinite(value).all():
            raise CheckpointError(f"{self._tensors[name].file.name}: tensor {name} holds NaN or Inf")

    def _files(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} has no weight_map")
            names = sorted(set(map(str, weight_map.values())))
            long = next((name for name in names if len(name) > _MOST_NAME), None)
            if long:
                raise CheckpointError(f"{index} names {shown(long)}, which no file is called")
            outside = next((name for name in names if Path(name).name != name), None)
            if outside:
                raise CheckpointError(f"{index} names {outside!r}, which is outside the checkpoint directory")
            missing = next((name for name in names if not (self.directory / name).is_file()), None)
            if missing:
                raise CheckpointError(f"{index} names {missing}, which is not there")
            return [self.directory / name for name in names]
        if single.is_file():
            return [single]
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.directory} has only pickled weights ({pickles[0]}); unpickling can run code, so only "
                "safetensors are read: convert them with transformers' save_pretrained first"
            )
        raise CheckpointError(f"{self.directory} has no model.safetensors and no model.safetensors.index.json")

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    piece = handle.get_slice(name)
                    kind, shape = piece.get_dtype(), tuple(piece.get_shape())
                    if _DERIVED.search(name) or (_MASK.search(name) and len(shape) == 4):
                        continue
                    if kind not in WEIGHT_DTYPES:
                        raise CheckpointError(f"{file.name}: tensor {name} is {kind}; supported are F32, F16 and BF16")
                    if name in self._tensors:
                        raise CheckpointError(f"tensor {name} is in {self._tensors[name].file.name} and {file.name}")
                    self._tensors[name] = StoredTensor(file, shape, WEIGHT_DTYPES[kind])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file, perhaps truncated: {error}") from error


def check_names(weights: Weights, expected: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    """Compare names and shapes with those that the model needs. Raises CheckpointError naming the first tensors at
    fault."""
    optional = {_HEAD} if tied else set()
    missing = sorted(set(expected) - set(weights) - optional)
    unexpected = sorted(set(weights) - set(expected) - optional)
    for names, what in ((missing, "lacks"), (unexpected, "has unexpected")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"{weights.directory} {what} tensors: {', '.join(names[:3])}{more}")
    for name, shape in expected.items():
        if name in weights and weights[name].shape != shape:
            raise CheckpointError(
                f"{weights[name].file.name}: tensor {name} has shape {list(weights[name].shape)}, "
                f"the config asks for {list(shape)}"
            )
    if tied and _HEAD in weights and not torch.equal(weights.tensor(_HEAD), weights.tensor(_EMBEDDING)):
        raise CheckpointError(f"the config ties the embeddings, but {_HEAD} differs from {_EMBEDDING}")


def check_sizes(config: PreTrainedConfig, weights: Weights) -> None:
    """Check that the config's sizes fit the stored tensors, before a model of these sizes is built.

    A small checkpoint may ask for any number of layers. Also computes the rotary embedding once. Raises
    CheckpointError.
    """
    path = weights.directory / "config.json"
    if config.num_hidden_layers > len(weights):
        raise CheckpointError(
            f"{path} asks for {config.num_hidden_layers} layers; the checkpoint has only {len(weights)} tensors"
        )
    if config.num_hidden_layers > _MOST_LAYERS:
        raise CheckpointError(f"{path} asks for {config.num_hidden_layers} layers; {_MOST_LAYERS} are read at most")
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
    try:
        with torch.device("meta"):
            return MODELS[config.model_type](config).eval()
    except CONFIG_ERRORS as error:
        raise UnsupportedConfigError(f"no model can be built from the config: {innermost(error)}") from error


def expected_shapes(model: LoopedModel) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a model's checkpoint must hold (a tied head only once)."""
    tied = model.config.tie_word_embeddings
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if not (tied and name == _HEAD)}


def open_checkpoint(directory: Path) -> tuple[LoopedModel, Weights]:
    """Return a model on the meta device and its weights, names and shapes checked. Raises CheckpointError."""
    config = read_config(directory)
    check_looped(config)
    weights = Weights(directory)
    check_sizes(config, weights)
    model = meta_model(config)
    check_names(weights, expected_shapes(model), tied=config.tie_word_embeddings)
    return model, weights


def load_weights(model: LoopedModel, weights: Weights, dtype: torch.dtype | None = None) -> LoopedModel:
    """Give a model on the meta device its weights, each cast to ``dtype`` or (None) memory-mapped in its stored type.

    Returns the model. Raises CheckpointError.
    """
    state = {name: weights.tensor(name, dtype) for name in expected_shapes(model)}
    if model.config.tie_word_embeddings:
        state[_HEAD] = state[_EMBEDDING]
    model.load_state_dict(state, strict=True, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def load_model(directory: Path | str, dtype: torch.dtype | None = None) -> LoopedModel:
    """Load a LoopLM or MELT from a checkpoint directory, in evaluation mode.

    With ``dtype`` None the weights get the narrowest type that can hold the values of all tensors; if they all have one
    type, they stay memory-mapped. Raises CheckpointError.
    """
    model, weights = open_checkpoint(Path(directory))
    return load_weights(model, weights, dtype or weights.dtype)
