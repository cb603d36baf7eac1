"""Reading the tensors of checkpoint directories: the one clear sentence for each file that does not load."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files
import pytest
import torch
from checkpoint_files import V_PROJ, change_config, change_tensors, refused, small_model
from melt_models import (
    CheckpointError,
)
from melt_models.checkpoint import (
    read_config,
)
from safetensors.torch import load_file, save_file

checkpoint = checkpoint_files.checkpoint


def test_a_missing_tensor_is_refused_by_name(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.pop(V_PROJ))
    refused(checkpoint, "lacks", V_PROJ)


def test_an_unexpected_tensor_is_refused_by_name(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.update({"model.layers.2.extra": torch.zeros(2)}))
    refused(checkpoint, "unexpected", "model.layers.2.extra")


def test_many_missing_tensors_are_counted(checkpoint: Path) -> None:
    change_config(checkpoint, num_hidden_layers=3)
    refused(checkpoint, "lacks", "model.layers.2", "and 8 more")


def test_an_untied_checkpoint_needs_its_head(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.pop("lm_head.weight"))
    refused(checkpoint, "lacks", "lm_head.weight")


def test_a_wrong_shape_is_refused_by_name(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.update({V_PROJ: torch.zeros(16, 64)}))
    refused(checkpoint, V_PROJ, "[16, 64]", "[32, 64]")


def test_a_tied_head_that_differs_from_the_embedding_is_refused(checkpoint: Path) -> None:
    change_config(checkpoint, tie_word_embeddings=True)
    refused(checkpoint, "ties", "lm_head.weight", "model.embed_tokens.weight")


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -100])
def test_a_truncated_file_is_refused(keep: int, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(checkpoint, "model.safetensors", "truncated")


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x10" + b"\0" * 7 + b"not json at all!"])
def test_a_corrupt_header_is_refused(header: bytes, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(header + file.read_bytes()[len(header) :])
    refused(checkpoint, "model.safetensors", "not a readable safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_reason(name: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    refused(checkpoint, name, "unpickling can run code", "safetensors")


def test_a_directory_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, str(checkpoint), "no model.safetensors")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "sharded"
    small_model().save_pretrained(directory, max_shard_size="60KB")
    return directory


def change_index(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_shard_that_is_not_there_is_refused_by_name(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, "index.json", shard.name, "not there")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_names_a_file_outside_is_refused(name: str, sharded: Path) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({V_PROJ: name}))
    refused(sharded, "index.json", name, "outside")


@pytest.mark.parametrize("length", [256, 1_000_000])
def test_an_index_that_names_what_no_file_is_called_is_refused(length: int, sharded: Path) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({V_PROJ: "a" * length}))
    refused(sharded, "index.json names 'aaaa", "...", "which no file is called")


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_without_a_map_is_refused(content: dict[str, Any], sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(sharded, "index.json", "weight_map")


def test_a_tensor_in_two_shards_is_refused_by_name(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: torch.zeros(2)}, second)
    refused(sharded, name, first.name, second.name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_that_is_not_finite_is_refused_by_name(value: float, checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t[V_PROJ][3].fill_(value))
    refused(checkpoint, V_PROJ, "NaN or Inf")


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8")])
def test_a_dtype_that_is_no_weight_is_refused_by_name(dtype: torch.dtype, name: str, checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.update({V_PROJ: t[V_PROJ].to(dtype)}))
    refused(checkpoint, V_PROJ, name, "F32, F16 and BF16")


def test_every_refusal_names_the_path_it_is_about(checkpoint: Path) -> None:
    change_config(checkpoint, hidden_act="relu")
    with pytest.raises(CheckpointError, match=re.escape(str(checkpoint / "config.json"))):
        read_config(checkpoint)
