"""Training snapshots to resume from: directories written completely or not at all, with hashes checked on reading."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as distributed

from ..atomic import new_directory, sweep, write_text
from .errors import SnapshotError

_TENSORS, _RECORD, _SETTINGS = "training.pt", "snapshot.json", "settings.json"
_KEPT = 2


@dataclass(frozen=True)
class Position:
    """Progress of a stage: finished steps, tokens, seconds of training, and the state of the data stream."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class Trained:
    """A prepared objective and its prepared optimisers: the contents of a snapshot beside the position."""

    objective: nn.Module
    optimizers: Sequence[Any]
    accelerator: Accelerator

    @property
    def sharded(self) -> bool:
        """Whether every process holds only a part of each tensor."""
        return self.accelerator.distributed_type == DistributedType.FSDP

    def model_state(self) -> dict[str, Tensor]:
        """Return the weights of ``objective.model``, whole, on the main process. Shards are gathered to its CPU."""
        options = distributed.StateDictOptions(full_state_dict=self.sharded, cpu_offload=self.sharded)
        state: dict[str, Any] = distributed.get_model_state_dict(self.objective, options=options)
        return {name.removeprefix("model."): value for name, value in state.items()}

    def _optimizer_states(self) -> list[dict[str, Any]]:
        if not self.sharded:
            return [optimizer.state_dict() for optimizer in self.optimizers]
        options = distributed.StateDictOptions(full_state_dict=True, cpu_offload=True)
        bare = [optimizer.optimizer for optimizer in self.optimizers]
        return [distributed.get_optimizer_state_dict(self.objective, one, options=options) for one in bare]

    def state(self) -> dict[str, Any]:
        """Return everything, except the position, on which the next step depends. Every process must call this."""
        version, keys, at, has_gauss, gauss = np.random.get_state()
        return {
            "model": self.model_state(),
            "optimizers": self._optimizer_states(),
            "python": random.getstate(),
            "numpy": [version, torch.from_numpy(np.asarray(keys).astype(np.int64)), at, has_gauss, gauss],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if self.accelerator.device.type == "cuda" else None,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state`` returned."""
        # Not strict: a parameter without a gradient so far has no optimiser state.
        options = distributed.StateDictOptions(full_state_dict=self.sharded, strict=False)
        model = {f"model.{name}": value for name, value in state["model"].items()}
        distributed.set_model_state_dict(self.objective, model, options=options)
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            if self.sharded:
                distributed.set_optimizer_state_dict(self.objective, optimizer.optimizer, values, options=options)
            else:
                optimizer.load_state_dict(values)
        random.setstate(state["python"])
        version, keys, at, has_gauss, gauss = state["numpy"]
        np.random.set_state((version, keys.numpy().astype(np.uint32), at, has_gauss, gauss))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"])


class Snapshots:
    """The two newest snapshots of a stage, in ``directory``.

    ``settings`` are everything that the stage's results depend on, as a flat mapping of JSON values. They are written
    once, and a stage resumes only with equal ones.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], accelerator: Accelerator):
        self.directory, self.accelerator = directory, accelerator
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))

    def open(self, *, resume: bool) -> None:
        """Prepare the directory. Raises SnapshotError if a snapshot would be lost, or has other settings."""
        if self.found() and not resume:
            raise SnapshotError(
                f"{self.directory} holds a snapshot of an unfinished run; pass --resume to go on, or another output"
            )
        path = self.directory / _SETTINGS
        if resume and path.is_file():
            self._compare(path)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.directory.mkdir(parents=True, exist_ok=True)
            for debris in self.directory.glob(".*.partial-*"):
                sweep(debris)
            write_text(path, json.dumps(self.settings, indent=2) + "\n")
        self.accelerator.wait_for_everyone()

    def found(self) -> list[Path]:
        """Return the snapshots, newest first."""
        return sorted((path for path in self.directory.glob("step-*") if path.is_dir()), reverse=True)

    def save(self, trained: Trained, position: Position) -> None:
        """Write a snapshot, then delete all but the two newest. Every process must call this."""
        state = trained.state()
        if self.accelerator.is_main_process:
            with new_directory(self.directory / f"step-{position.step:09d}", force=True) as build:
                torch.save(state, build / _TENSORS)
                record = {
                    "step": position.step,
                    "tokens": position.tokens,
                    "seconds": position.seconds,
                    "data": position.data,
                    "sha256": _digest(build / _TENSORS),
                }
                (build / _RECORD).write_text(json.dumps(record), encoding="utf-8")
            for old in self.found()[_KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load(self, trained: Trained) -> Position:
        """Restore the newest undamaged snapshot and return its position; without any snapshot, the start.

        Raises SnapshotError if all snapshots are damaged.
        """
        chosen: list[Any] = [self._newest_whole() if self.accelerator.is_main_process else None]
        broadcast_object_list(chosen)
        path, error = chosen[0]
        if error:
            raise SnapshotError(error)
        if path is None:
            return Position()
        trained.load(torch.load(path / _TENSORS, map_location="cpu", weights_only=True))
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        return Position(record["step"], record["tokens"], record["seconds"], record["data"])

    def clear(self) -> None:
        """Delete the snapshots of a finished stage and keep its settings."""
        if self.accelerator.is_main_process:
            for path in self.found():
                shutil.rmtree(path, ignore_errors=True)

    def _newest_whole(self) -> tuple[Path | None, str | None]:
        found = self.found()
        for path in found:
            problem = _damage(path)
            if problem is None:
                return path, None
            print(f"{path} is damaged ({problem}); trying the one before", file=sys.stderr)
        if found:
            return None, f"every snapshot in {self.directory} is damaged; delete that directory to start again"
        return None, None

    def _compare(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SnapshotError(f"{path} cannot be read: {error}; delete {path.parent} to start again") from error
        differing = [name for name in {**stored, **self.settings} if stored.get(name) != self.settings.get(name)]
        if differing:
            shown = ", ".join(f"{name} was {stored.get(name)!r}, is {self.settings.get(name)!r}" for name in differing)
            raise SnapshotError(
                f"{path.parent} was begun with other settings ({shown}); restore them or choose another output"
            )


def _damage(path: Path) -> str | None:
    """Describe the damage of a snapshot; None if there is none."""
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        if not {"step", "tokens", "seconds", "data", "sha256"} <= set(record):
            return f"{_RECORD} is incomplete"
        return None if _digest(path / _TENSORS) == record["sha256"] else f"{_TENSORS} is not what was written"
    except (OSError, ValueError, TypeError) as error:
        return str(error)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
