"""The ``melt-train`` command. It checks its arguments before it imports PyTorch.

``melt-train STAGE --config FILE`` trains, ``melt-train eval RUN`` evaluates. Each stage is a command of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


_HELP = {
    StageName.teacher: "Train a LoopLM, the teacher.",
    StageName.phase1: "Turn the teacher into a MELT, whose loops come to share a cache.",
    StageName.phase2: "Distill the teacher into the MELT of phase 1.",
    StageName.gate: "Train the exit gate alone to say when another loop helps.",
    StageName.all: "Train all stages that the file has, in order.",
}
app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def _about() -> None:
    """Train a LoopLM teacher, from it a MELT in two phases, and an exit gate.

    Prefix with `accelerate launch` for several devices.
    """


def _add_stage(stage: StageName) -> None:
    """Add the command that trains a stage."""

    @app.command(stage.value, help=_HELP[stage])
    def train(
        config: Annotated[Path, typer.Option(help="The run's YAML file.")],
        resume: Annotated[
            bool, typer.Option("--resume", help="Go on from the last snapshot; finished stages are skipped.")
        ] = False,
        output: Annotated[Path | None, typer.Option(help="Write here instead of the file's `output`.")] = None,
    ) -> None:
        with _errors("stopped; the same command with --resume goes on from the last snapshot"):
            read_sections(config)
            settings, stages = _train(stage, config, output, resume)
        if _speaks():
            for name in stages:
                print(settings.output / name)


for _name in StageName:
    _add_stage(_name)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="The run's YAML file, or the directory that it wrote.")],
    output: Annotated[Path | None, typer.Option(help="The run is here instead of in the file's `output`.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Held-out sequences.")] = 64,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems of a task.")] = 200,
    loops: Annotated[
        int | None, typer.Option(min=1, help="Evaluate 1 to this many loops; default: as trained.")
    ] = None,
    chunk_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Chunks in which a MELT reads; may be repeated. Default: its own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a run's checkpoints on held-out data: loss, perplexity, and of a task exact answers, by loops."""
    with _errors("stopped"):
        if not run.is_dir():
            read_sections(run)
        from .evaluate_run import evaluate_run, open_run
        from .report import print_evaluations, to_json

        _quiet()
        found = evaluate_run(
            open_run(run, output),
            sequences=sequences,
            problems=problems,
            loops=loops,
            chunk_sizes=chunk_size or (),
            batch=batch_size,
        )
    if as_json:
        print(json.dumps(to_json(found), indent=2))
    else:
        print_evaluations(found, sys.stdout)


def _train(stage: StageName, config: Path, output: Path | None, resume: bool) -> tuple[RunConfig, list[str]]:
    """Train, and return the run and the names of its stages."""
    from torch import distributed

    from .config import read_run
    from .stages import run

    _quiet()
    try:
        settings = read_run(config, output=output)
        stages = settings.stages() if stage is StageName.all else [stage.value]
        run(settings, stages, resume=resume)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return settings, stages


def _quiet() -> None:
    """Leave the terminal to the progress of the training."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@contextmanager
def _errors(stopped: str) -> Iterator[None]:
    """End the command with one sentence and an exit code for every error that is expected."""
    try:
        yield
    except TrainingDivergedError as error:
        _fail(str(error), 1, error)
    except (ConfigError, CheckpointError, SnapshotError, TargetExistsError, OSError) as error:
        _fail(str(error), 2, error)
    except KeyboardInterrupt as error:
        _fail(stopped, _INTERRUPTED, error)


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
