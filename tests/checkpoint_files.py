"""Small checkpoint directories, ready to be spoiled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from melt_models import (
    CheckpointError,
    LoopLMConfig,
    LoopLMForCausalLM,
    MeltConfig,
    MeltForCausalLM,
    UnsupportedConfigError,
)
from melt_models.checkpoint import (
    load_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "total_ut_steps": 3,
}
V_PROJ = "model.layers.1.self_attn.v_proj.weight"
MODELS = {"ouro": (LoopLMConfig, LoopLMForCausalLM), "melt": (MeltConfig, MeltForCausalLM)}


def small_model(kind: str = "ouro", **fields: Any) -> Any:
    torch.manual_seed(0)
    config_class, model_class = MODELS[kind]
    return model_class(config_class(**{**SIZES, **fields})).eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A LoopLM checkpoint in one file, ready to be spoiled."""
    directory = tmp_path / "checkpoint"
    small_model().save_pretrained(directory)
    return directory


def change_config(directory: Path, drop: tuple[str, ...] = (), **fields: Any) -> None:
    path = directory / "config.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in drop}))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory: Path, *words: str, config: bool = False) -> None:
    """load_model refuses with one line that holds all of the words."""
    with pytest.raises(UnsupportedConfigError if config else CheckpointError) as caught:
        load_model(directory)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@torch.no_grad()
def same(directory: Path, model: Any) -> None:
    """The directory loads as this model, bit by bit."""
    loaded = load_model(directory)
    assert type(loaded) is type(model)
    assert not loaded.training
    ids = torch.arange(7)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
