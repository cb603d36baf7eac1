"""Measures a finished run and writes result.json beside its checkpoints.

    python benchmarks/experiments/measure.py NAME [--root build/experiments]

Counts exact matches by greedy decoding, one token at a time with a cache, on problems that are never trained on: drawn
evenly, and with long carries.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import typer
from melt_models import LoopLMForCausalLM
from melt_models.atomic import write_text
from melt_models.checkpoint import load_model
from melt_models.training.evaluate import Model, exact_match
from melt_models.training.tasks import Example, make_task
from runs import Run, all_runs
from shared import machine, versions

PROBLEMS = 500
LOOPS = tuple(range(1, 9))
THRESHOLDS = (0.5, 0.7, 0.9, 0.95, 0.99, 0.999, 1.0)
CHUNK_SIZES = (1, 2, 4, 8, 16, 32)
POINTS = 100  # per loss curve
_NOT_LOSSES = ("step", "tokens", "seconds")

Problems: TypeAlias = dict[str, list[Example]]
Figures: TypeAlias = dict[str, Any]


def problems(data: dict[str, Any], count: int) -> tuple[Problems, Sequence[str]]:
    """Return held-out problems by kind, the same for every run, and the task's vocabulary."""
    task = make_task(**data)
    return {"even": task.test_set(count), "long": task.test_set(count, hard=True)}, task.vocabulary


def score(model: Model, sets: Problems, vocabulary: Sequence[str], **settings: Any) -> Figures:
    """Return the accuracy (0 to 1) on each kind of problem, and the mean loops per written token over both."""
    scores = {kind: exact_match(model, examples, vocabulary, **settings) for kind, examples in sets.items()}
    accuracies = {kind: round(one.accuracy, 4) for kind, one in scores.items()}
    return {**settings, **accuracies, "loops": round(statistics.fmean(one.loops for one in scores.values()), 4)}


def curves(model: Model, sets: Problems, vocabulary: Sequence[str]) -> dict[str, list[Figures]]:
    """Return accuracy by number of loops, by exit threshold, and by the prompt's chunk size."""
    found = {
        "by_loops": [score(model, sets, vocabulary, num_loops=loops) for loops in LOOPS],
        "by_threshold": [score(model, sets, vocabulary, exit_threshold=threshold) for threshold in THRESHOLDS],
    }
    if not isinstance(model, LoopLMForCausalLM):
        found["by_chunk"] = [score(model, sets, vocabulary, chunk_size=size) for size in CHUNK_SIZES]
    return found


def cache_bytes(model: Model) -> int:
    """Return the bytes of a token's keys and values in the cache, in the model's own precision."""
    config = model.config
    caches = config.total_ut_steps if isinstance(model, LoopLMForCausalLM) else 1
    row = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return caches * row * next(model.parameters()).element_size()


def losses(file: Path) -> tuple[list[Figures], float]:
    """Average a stage's record over up to POINTS equal parts of its steps. Also returns the seconds it took."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    size = -(-len(lines) // POINTS)
    pieces = [lines[at : at + size] for at in range(0, len(lines), size)]
    names = [name for name in lines[0] if name not in _NOT_LOSSES and "rate" not in name]
    points = [
        {"step": piece[-1]["step"], **{name: _short(statistics.fmean(x[name] for x in piece)) for name in names}}
        for piece in pieces
    ]
    return points, lines[-1]["seconds"]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def measure(run: Run, count: int) -> Figures:
    """Measure a run and return its figures."""
    begun, output = time.monotonic(), Path(run.content["output"])
    sets, vocabulary = problems(run.content["data"], count)
    stages = {}
    for stage in run.stages:
        model = load_model(output / stage, dtype=torch.float32).eval()
        points, seconds = losses(output / "metrics" / f"{stage}.jsonl")
        stages[stage] = {**score(model, sets, vocabulary), "seconds": round(seconds), "losses": points}
    if run.seed or (not run.curves and run.row not in ("teacher", "gate", "last")):
        for figures in stages.values():
            del figures["losses"]  # not plotted
    found: Figures = {
        "name": run.name,
        "row": run.row,
        "seed": run.seed,
        "problems": count,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "cache_bytes_a_token": cache_bytes(model),
        "stages": stages,
    }
    if run.curves:
        found |= curves(model, sets, vocabulary)
    return found | {
        "content": run.content,
        "measuring_seconds": round(time.monotonic() - begun),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": versions(),
    }


def main(
    name: Annotated[str, typer.Argument(help="The run's name in runs.py.")],
    root: Annotated[Path, typer.Option(help="Where runs are written.")] = Path("build/experiments"),
    quick: Annotated[bool, typer.Option("--quick", help="Few problems.")] = False,
) -> None:
    """Measure a finished run and write its result.json."""
    torch.set_num_threads(1)
    (run,) = [run for run in all_runs(root, quick) if run.name == name]
    result = measure(run, 20 if quick else PROBLEMS)
    write_text(Path(run.content["output"]) / "result.json", json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
