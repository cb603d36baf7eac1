"""Records of a training run: JSON lines, TensorBoard where it is installed, and a progress bar."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..atomic import write_text

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
        self.board = _board(directory / "tensorboard" / stage, step)
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("loss {task.fields[loss]}"), console=console)
            self.bar.start()
            self.task = self.bar.add_task(stage, total=steps, completed=step, loss="-")
        self.begun, self.first, self.spoken = time.monotonic(), step, time.monotonic()

    def step(self, done: int, figures: dict[str, Any], *, log: bool) -> None:
        """Record a finished step (counted from 1), as a line of the file if ``log``."""
        if log:
            self.file.write(json.dumps({"step": done, **figures}) + "\n")
            self.file.flush()
            if self.board is not None:
                for name, value in figures.items():
                    self.board.add_scalar(name, value, done)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, loss=f"{figures['loss']:.4f}")
        elif done == self.steps or time.monotonic() - self.spoken > _QUIET_SECONDS:
            now = time.monotonic()
            left = (now - self.begun) / (done - self.first) * (self.steps - done)
            line = f"{self.stage}: step {done}/{self.steps}, loss {figures['loss']:.4f}, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)
            self.spoken = now

    def sync(self) -> None:
        """Flush the lines to disk. Called before a snapshot, whose steps they record."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
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


def _board(directory: Path, step: int) -> Any:
    """Return a TensorBoard writer, or None where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)
