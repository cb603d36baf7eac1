"""MELT and LoopLM checkpoints with random weights in the shape of a real model, for measurements.

They are written shard by shard, in little memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from melt_models import LoopLMConfig, MeltConfig
from melt_models.atomic import new_directory
from melt_models.checkpoint import expected_shapes, meta_model
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
_SHARD_BYTES = 1 << 30
_SCALE = 0.02


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return a bf16 tensor: ones for norm weights, zeros for biases, else normal with a standard deviation of 0.02."""
    if "norm" in name:
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
    shapes = expected_shapes(meta_model(config))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    with new_directory(output, force=force) as build:

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
        config.save_pretrained(build)
