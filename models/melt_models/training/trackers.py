"""Programs that draw curves of a run: TensorBoard where it is installed, Weights & Biases where it is set up."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..atomic import write_text

# W&B sends figures to a server and may ask for a login, so that being installed is not enough.
WANDB_VARIABLES = ("WANDB_PROJECT", "WANDB_API_KEY", "WANDB_MODE")


class Tracker(Protocol):
    """Receives the figures of every logged step of a stage."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def trackers(directory: Path, stage: str, step: int) -> list[Tracker]:
    """Return the trackers of a stage that goes on after ``step`` steps. They write below ``directory``."""
    found: list[Tracker] = []
    if find_spec("tensorboard") is not None:
        found.append(TensorBoard(directory / "tensorboard" / stage, step))
    if find_spec("wandb") is not None and any(os.environ.get(name) for name in WANDB_VARIABLES):
        try:
            found.append(WandB(directory, stage, step))
        except Exception as error:  # a library of its own kinds of errors, and figures are on disk anyway
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"melt-train: Weights & Biases gets no figures: {reason}", file=sys.stderr)
    return found


class TensorBoard:
    """Event files in ``directory``."""

    def __init__(self, directory: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A W&B run for each stage, in the project of WANDB_PROJECT (else "melt").

    A resumed stage goes on in the same W&B run, whose id is kept in ``directory``; W&B ignores steps it has had.
    """

    def __init__(self, directory: Path, stage: str, step: int):
        import wandb

        file = directory / f"{stage}.wandb-id"
        if not step or not file.is_file():
            write_text(file, uuid.uuid4().hex)
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "melt",
            name=f"{directory.parent.name}/{stage}",
            id=file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(directory),
            settings={"console": "off"},  # figures alone, not what the terminal shows
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()
