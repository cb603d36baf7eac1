"""Memory that training keeps for the backward pass, by sequence length, chunk size and loops.

    python benchmarks/training_memory.py [--json FILE]

Counts the bytes of every tensor that autograd keeps between the forward and the backward pass of a phase-2 step, for
one sequence (each storage once, weights excluded). The count is exact and equal on every machine. Weights, gradients,
optimiser states and the teacher's cache need memory besides. ``write_docs.py`` writes the JSON file's figures to
docs/benchmarks.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import save
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltForCausalLM
from melt_models.convert import melt_config
from melt_models.training.objectives import PHASE2, DistillObjective, StepSize
from rich.console import Console
from rich.progress import track
from torch import Tensor

MODES: dict[str, dict[str, Any]] = {
    "everything kept": {},
    "checkpointing": {"checkpointing": True},
    "checkpointing, truncate: 2": {"checkpointing": True, "truncate": 2},
}
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Point:
    """One measurement: tokens per sequence, tokens per chunk, loops per token."""

    tokens: int = 1024
    chunk: int = 128
    loops: int = 4


BASE = Point()
POINTS = (
    *(replace(BASE, tokens=tokens) for tokens in (256, 512, 1024, 2048)),
    *(replace(BASE, chunk=chunk) for chunk in (32, 512)),
    *(replace(BASE, loops=loops) for loops in (1, 2, 8)),
)


def kept_bytes(point: Point, mode: dict[str, Any]) -> int:
    """Return the most bytes that autograd keeps at once. A truncated run frees each span before the next."""
    torch.manual_seed(0)
    teacher = LoopLMForCausalLM(LoopLMConfig(**SHAPE, total_ut_steps=point.loops))
    student = MeltForCausalLM(melt_config(teacher.config, chunk_size=point.chunk))
    objective = DistillObjective(student, teacher, replace(PHASE2, **mode), seed=0)
    weights = {weight.untyped_storage().data_ptr() for weight in student.parameters()}
    ids = torch.randint(0, SHAPE["vocab_size"], (1, point.tokens))
    most = 0
    for span in objective.spans(point.tokens):
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = objective(ids, ids.roll(-1, 1), StepSize(point.tokens, 1), 0, 1, span)
        most = max(most, sum(kept.values()))
        losses.total.backward()
    return most


def main(
    path: Annotated[Path | None, typer.Option("--json", help="Add the results to this file.")] = None,
) -> None:
    """Measure all points in all modes, about a minute."""
    console = Console(stderr=True)
    rows = [
        {
            "tokens": p.tokens,
            "chunk": p.chunk,
            "loops": p.loops,
            **{name: kept_bytes(p, m) for name, m in MODES.items()},
        }
        for p in track(POINTS, "measuring", console=console)
    ]
    section = {
        "command": "python benchmarks/training_memory.py --json docs/benchmarks.json",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "shape": SHAPE,
        "modes": list(MODES),
        "rows": rows,
    }
    for row in rows:
        typer.echo("  ".join(f"{name} {value:,}" for name, value in row.items()))
    if path is not None:
        save(path, "training_memory", section)


if __name__ == "__main__":
    typer.run(main)
