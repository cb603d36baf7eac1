"""``melt-train eval``: the quality of a run's checkpoints on the same held-out data, beside their teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..checkpoint import load_model
from ..melt import MeltForCausalLM
from .config import STAGES, RunConfig, read_run
from .errors import ConfigError
from .held_out import Evaluation, HeldOut
from .stages import RUN_FILE
from .trainer import make_accelerator


def open_run(run: Path, output: Path | None = None) -> RunConfig:
    """Read a run from its YAML file, or from the directory that it wrote. Raises ConfigError."""
    if not run.is_dir():
        return read_run(run, output=output)
    file = run / RUN_FILE
    if not file.is_file():
        raise ConfigError(f"{run} holds no {RUN_FILE}, so it is not a run with a finished stage; name its YAML file")
    return read_run(file, output=output or run)


def evaluate_run(
    run: RunConfig,
    *,
    sequences: int = 64,
    problems: int = 200,
    loops: int | None = None,
    chunk_sizes: Sequence[int] = (),
    batch: int = 8,
) -> dict[str, Evaluation]:
    """Evaluate the teacher and the finished stages at 1 to ``loops`` loops (None: as many as trained).

    A MELT is evaluated once for each of ``chunk_sizes`` (none: its own), under the name "phase2, chunks of 4". Raises
    ConfigError, CheckpointError, OSError.
    """
    found = _checkpoints(run)
    if not found:
        raise ConfigError(f"{run.output} holds no finished stage; train one with: melt-train all --config {run.file}")
    if run.threads:
        torch.set_num_threads(run.threads)
    device = make_accelerator().device
    try:
        held_out = HeldOut.draw(run.data, sequences, problems)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{run.file}: section data: {error}") from error
    evaluations = {}
    for name, directory in found.items():
        model = load_model(directory, dtype=torch.float32).to(device).eval()  # type: ignore[arg-type]
        depths = range(1, (loops or model.config.total_ut_steps) + 1)
        for size in (chunk_sizes if isinstance(model, MeltForCausalLM) else ()) or (None,):
            title = name if size is None else f"{name}, chunks of {size}"
            evaluations[title] = held_out.evaluate(model, depths, batch=batch, chunk_size=size)
    return evaluations


def _checkpoints(run: RunConfig) -> dict[str, Path]:
    """Return the directories of the checkpoints that are there, the teacher first."""
    found = {"teacher": run.teacher} if isinstance(run.teacher, Path) else {}
    found |= {name: run.output / name for name in STAGES if name not in found and (run.output / name).is_dir()}
    return found
