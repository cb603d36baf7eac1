"""Reading checkpoint directories, strictly: everything expected is there, nothing else is, and all of it is finite."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from .configuration import LoopLMConfig, MeltConfig
from .directory import check_directory
from .errors import CheckpointError, UnsupportedConfigError
from .looplm import LoopLMForCausalLM
from .melt import MeltForCausalLM

WEIGHT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONFIGS: dict[str, type[PreTrainedConfig]] = {"ouro": LoopLMConfig, "melt": MeltConfig, "llama": LlamaConfig}
LoopedModel: TypeAlias = LoopLMForCausalLM | MeltForCausalLM
MODELS: dict[str, Any] = {"ouro": LoopLMForCausalLM, "melt": MeltForCausalLM}
# What building a configuration from untrusted values can raise.
CONFIG_ERRORS = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def read_config(directory: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint directory: LoopLM ("ouro"), MELT or Llama. Raises CheckpointError."""
    check_directory(directory)
    path = directory / "config.json"
    content = read_json(path)
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIGS:
        raise UnsupportedConfigError(
            f"{path} has model_type {model_type!r}; supported are {', '.join(repr(name) for name in CONFIGS)}"
        )
    try:
        config = CONFIGS[model_type].from_dict(content)
        config.validate()
    except CONFIG_ERRORS as error:
        raise UnsupportedConfigError(f"{path}: {innermost(error)}") from error
    return config


def innermost(error: BaseException) -> str:
    """The sentence at the bottom of a chain of wrapped validation errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(Mapping[str, StoredTensor]):
    """The tensors of a checkpoint directory, by name, read from disk only when asked for.

    Single or sharded safetensors. Raises CheckpointError for anything that cannot be trusted.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._tensors: dict[str, StoredTensor] = {}
        for file in self._files():
            self._read_header(file)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def tensor(self, name: str) -> Tensor:
        """The tensor itself, memory-mapped. Raises CheckpointError if it holds NaN or Inf."""
        stored = self._tensors[name]
        with safe_open(stored.file, framework="pt") as handle:
            value = handle.get_tensor(name)
        # A sum is finite only if every element is, except for overflow: then look at each.
        if not torch.isfinite(value.sum(dtype=torch.float32)) and not torch.isfinite(value).all():
            raise CheckpointError(f"{stored.file.name}: tensor {name} holds NaN or Inf")
        return value

    def _files(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} has no weight_map")
            names = sorted(set(map(str, weight_map.values())))
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
                    kind = piece.get_dtype()
                    if kind not in WEIGHT_DTYPES:
                        raise CheckpointError(f"{file.name}: tensor {name} is {kind}; supported are F32, F16 and BF16")
                    if name in self._tensors:
                        raise CheckpointError(f"tensor {name} is in {self._tensors[name].file.name} and {file.name}")
                    self._tensors[name] = StoredTensor(file, tuple(piece.get_shape()), WEIGHT_DTYPES[kind])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file, perhaps truncated: {error}") from error


def check_names(weights: Weights, expected: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    """Compares names and shapes with what the model needs. Raises CheckpointError naming the first tensors at fault."""
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


def hollow_model(config: PreTrainedConfig) -> LoopedModel:
    """The model of a config with no memory behind its weights, in evaluation mode."""
    if config.model_type not in MODELS:
        raise UnsupportedConfigError(
            f"model_type {config.model_type!r} is not a looped model; run melt-convert on the checkpoint first"
        )
    with torch.device("meta"):
        return MODELS[config.model_type](config).eval()


def expected_shapes(model: LoopedModel) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model's checkpoint must hold (a tied head only once)."""
    tied = model.config.tie_word_embeddings
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if not (tied and name == _HEAD)}


def open_checkpoint(directory: Path) -> tuple[LoopedModel, Weights]:
    """A hollow model and the checked names and shapes of its weights. Raises CheckpointError."""
    config = read_config(directory)
    model = hollow_model(config)
    weights = Weights(directory)
    check_names(weights, expected_shapes(model), tied=config.tie_word_embeddings)
    return model, weights


def load_model(directory: Path | str, dtype: torch.dtype | None = None) -> LoopedModel:
    """A LoopLM or MELT from a checkpoint directory, in evaluation mode.

    ``dtype`` None keeps the stored one (then the weights stay memory-mapped). Raises CheckpointError.
    """
    model, weights = open_checkpoint(Path(directory))
    dtype = dtype or weights[_EMBEDDING].dtype
    state = {name: weights.tensor(name).to(dtype) for name in expected_shapes(model)}
    if model.config.tie_word_embeddings:
        state[_HEAD] = state[_EMBEDDING]
    model.load_state_dict(state, strict=True, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
