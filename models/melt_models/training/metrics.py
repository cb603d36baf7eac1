"""Records of a training run: JSON lines, TensorBoard and Weights & Biases, and a progress bar."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..atomic import write_text
from .held_out import Evaluation
from .trackers import Tracker, trackers

_QUIET_SECONDS = 30.0  # between progress lines without a terminal


class Recorder:
    """Writes the figures of every logged step of a stage to ``directory``.

    A resumed stage drops the lines after its first step, so that the file reads as if the run had not been interrupted.
    """

    def __init__(self, directory: Path, stage: str, step: int, steps: int):
        self.path, self.stage, self.steps = directory / f"{stage}.jsonl", stage, steps
        kept = _lines_up_to(self.path, step) if step else []
        write_text(self.path, "".join(line + "\n" for line in kept))
        self.file = self.path.open("a", encoding="utf-8")
        self.trackers: list[Tracker] = trackers(directory, stage, step)
        self.evaluation: Evaluation | None = None
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("loss {task.fields[loss]}"), console=console)
            self.bar.start()
            self.task = self.bar.add_task(stage, total=steps, completed=step, loss="-")
        self.begun, self.first, self.spoken = time.monotonic(), step, time.monotonic()

    def step(self, done: int, figures: dict[str, Any], evaluation: Evaluation | None = None, *, log: bool) -> None:
        """Record a finished step (counted from 1), as a line of the file if ``log`` or if the model was evaluated."""
        if evaluation is not None:
            figures, self.evaluation = figures | evaluation.figures(), evaluation
        if log or evaluation is not None:
            self.file.write(json.dumps({"step": done, **figures}) + "\n")
            self.file.flush()
            for tracker in self.trackers:
                tracker.log(done, figures)
        loss = f"{figures['loss']:.4f}"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, loss=loss + _quality(self.evaluation, short=True))
        elif done == self.steps or time.monotonic() - self.spoken > _QUIET_SECONDS:
            now = time.monotonic()
            left = (now - self.begun) / (done - self.first) * (self.steps - done)
            line = f"{self.stage}: step {done}/{self.steps}, loss {loss}{_quality(self.evaluation)}, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)
            self.spoken = now

    def sync(self) -> None:
        """Flush the lines to disk. Called before a snapshot, whose steps they record."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        for tracker in self.trackers:
            tracker.close()
        if self.bar is not None:
            self.bar.stop()


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Return the lines of steps up to ``step``, without a last line that was only partly written."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _quality(evaluation: Evaluation | None, *, short: bool = False) -> str:
    """Return the quality at full depth in words, ", held-out 3.2100 (perplexity 24.8), 81.5% exact", or to fit beside a
    bar: " eval 3.2100 ppl 24.8 exact 81.5%"."""
    if evaluation is None:
        return ""
    full = evaluation.depths[-1]
    exact = "" if full.exact is None else f" exact {full.exact:.1%}" if short else f", {full.exact:.1%} exact"
    if short:
        return f" eval {full.loss:.4f} ppl {full.perplexity:.4g}{exact}"
    return f", held-out {full.loss:.4f} (perplexity {full.perplexity:.4g}){exact}"
