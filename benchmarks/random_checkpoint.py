"""Checkpoints with random weights in the shape of a real model, for measurements: MELT's, a LoopLM's, or a published
layout's.

They are written shard by shard, in little memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from melt_models import LoopLMConfig, MeltConfig
from melt_models.atomic import new_directory
from melt_models.checkpoint import CONFIGS, expected_shapes, meta_model
from melt_models.configuration import LoopedConfig
from melt_runtime.progress import Step, no_progress
from safetensors.torch import save_file

SHAPES = {
    "ouro-1.4b": MeltConfig(num_hidden_layers=24, chunk_size=128),
    "ouro-2.6b": MeltConfig(num_hidden_layers=48, chunk_size=128),
}
LOOPLM_SHAPES = {
    "ouro-1.4b": LoopLMConfig(num_hidden_layers=24),
    "ouro-2.6b": LoopLMConfig(num_hidden_layers=48),
}
# The config.json of published models, without what only their own code reads.
PUBLISHED: dict[str, dict[str, Any]] = {
    "nanbeige4.2-3b": {
        "model_type": "nanbeige",
        "vocab_size": 166144,
        "hidden_size": 3072,
        "intermediate_size": 10752,
        "num_hidden_layers": 22,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 65536,
        "rope_theta": 70000000,
        "rms_norm_eps": 1e-05,
        "num_loops": 2,
        "tie_word_embeddings": False,
    },
    "huginn-0125": {
        "model_type": "huginn_raven",
        "n_embd": 5280,
        "n_heads": 55,
        "head_dim": 96,
        "intermediate_size": 17920,
        "padded_vocab_size": 65536,
        "block_size": 4096,
        "n_layers_in_prelude": 2,
        "n_layers_in_recurrent_block": 4,
        "n_layers_in_coda": 2,
        "mean_recurrence": 32,
        "norm_eps": 1e-06,
        "rope_base": 50000,
        "qk_bias": True,
        "tie_embeddings": True,
        "tie_word_embeddings": True,
    },
}
_SHARD_BYTES = 1 << 30
_SCALE = 0.02


def resized(config: LoopedConfig, *, layers: int, hidden: int, vocabulary: int, loops: int) -> dict[str, Any]:
    """Return a configuration's fields in other sizes; at another ``hidden`` with fewer heads of the same size."""
    shape = {**config.to_dict(), "num_hidden_layers": layers, "vocab_size": vocabulary, "total_ut_steps": loops}
    if hidden != shape["hidden_size"]:
        heads = hidden // shape["head_dim"]
        shape |= {"hidden_size": hidden, "intermediate_size": 2 * hidden}
        shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    return shape


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return a bf16 tensor: ones for norm weights, zeros for biases, else normal with a standard deviation of 0.02."""
    if "norm" in name or name.endswith("ln_f.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * _SCALE).to(torch.bfloat16)


def make(
    output: Path,
    config: MeltConfig | LoopLMConfig,
    *,
    seed: int = 0,
    force: bool = False,
    progress: Step = no_progress,
) -> None:
    """Write config.json and sharded safetensors. Raises TargetExistsError, OSError."""
    with new_directory(output, force=force) as build:
        _write_tensors(build, expected_shapes(meta_model(config)), seed, progress)
        config.save_pretrained(build)


def make_published(
    output: Path, content: dict[str, Any], *, seed: int = 0, force: bool = False, progress: Step = no_progress
) -> None:
    """Write a family's config.json and its tensors under published names. Raises TargetExistsError, OSError."""
    config = CONFIGS[content["model_type"]].from_dict(content)
    shapes = config.published_shapes(expected_shapes(meta_model(config)))
    with new_directory(output, force=force) as build:
        _write_tensors(build, shapes, seed, progress)
        (build / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_tensors(build: Path, shapes: dict[str, tuple[int, ...]], seed: int, progress: Step) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, build / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        shard[name] = random_tensor(name, shape, generator)
        progress("writing random weights", len(shapes), 1)
        if sum(t.nbytes for t in shard.values()) > _SHARD_BYTES:
            flush()
    if shard:
        flush()
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (build / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
