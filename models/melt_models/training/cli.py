"""The ``melt-train`` command. It checks its arguments before it imports PyTorch."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..atomic import TargetExistsError
from ..errors import CheckpointError
from .errors import ConfigError, SnapshotError, TrainingDivergedError
from .sections import read_sections

if TYPE_CHECKING:
    from .config import RunConfig

_INTERRUPTED = 130


class StageName(StrEnum):
    """Stages that can be trained."""

    teacher = "teacher"
    phase1 = "phase1"
    phase2 = "phase2"
    gate = "gate"
    all = "all"


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def train(
    stage: Annotated[StageName, typer.Argument(help="One stage, or all that the file has, in order.")],
    config: Annotated[Path, typer.Option(help="The run's YAML file.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last snapshot; finished stages are skipped.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write here instead of the file's `output`.")] = None,
) -> None:
    """Train a LoopLM teacher, from it a MELT in two phases, and an exit gate.

    Prefix with `accelerate launch` for several devices.
    """
    try:
        read_sections(config)
        settings, stages = _train(stage, config, output, resume)
    except TrainingDivergedError as error:
        _fail(str(error), 1, error)
    except (ConfigError, CheckpointError, SnapshotError, TargetExistsError, OSError) as error:
        _fail(str(error), 2, error)
    except KeyboardInterrupt as error:
        _fail("stopped; the same command with --resume goes on from the last snapshot", _INTERRUPTED, error)
    if _speaks():
        for name in stages:
            print(settings.output / name)


def _train(stage: StageName, config: Path, output: Path | None, resume: bool) -> tuple[RunConfig, list[str]]:
    """Train, and return the run and the names of its stages."""
    from torch import distributed
    from transformers.utils import logging as transformers_logging

    from .config import read_run
    from .stages import run

    transformers_logging.disable_progress_bar()
    try:
        settings = read_run(config, output=output)
        stages = settings.stages() if stage is StageName.all else [stage.value]
        run(settings, stages, resume=resume)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return settings, stages


def _speaks() -> bool:
    """Return whether this is the main process of a launch. All processes meet the same errors; one prints them."""
    return os.environ.get("RANK", "0") == "0"


def _fail(sentence: str, code: int, error: BaseException) -> None:
    if _speaks():
        print(f"melt-train: {sentence}", file=sys.stderr)
    raise typer.Exit(code) from error


def main() -> None:
    """Run ``python -m melt_models.training.cli``, which ``accelerate launch -m`` starts."""
    app()


if __name__ == "__main__":
    main()
