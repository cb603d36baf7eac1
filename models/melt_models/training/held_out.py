"""The held-out part of a run's data, drawn once and the same for every model, and the quality of a model on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import IGNORE, Batch, Batches, make_batches
from .evaluate import Model, cross_entropy, exact_match
from .tasks import Example, Task, make_task

if TYPE_CHECKING:
    from accelerate import Accelerator

_SEED = 0  # of every run, so that figures of different runs can be compared


@dataclass(frozen=True)
class DepthScore:
    """Quality with a number of loops.

    - ``loss``: mean cross-entropy per target, in nats.
    - ``exact``: share of the problems answered exactly, 0 to 1; None where the data have no problems.
    """

    loops: int
    loss: float
    exact: float | None = None

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where that is no float."""
        return math.exp(self.loss) if self.loss < 709 else math.inf if self.loss == self.loss else math.nan

    def values(self) -> dict[str, float]:
        """Return the finite figures by name."""
        found = {"loss": self.loss, "perplexity": self.perplexity, "exact": self.exact}
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model by depth, from few loops to many, on that many sequences, targets and problems."""

    sequences: int
    targets: int
    problems: int
    depths: tuple[DepthScore, ...]

    @property
    def finite(self) -> bool:
        return all(math.isfinite(depth.loss) for depth in self.depths)

    def figures(self) -> dict[str, float]:
        """Return figures for the record: ``eval_loss``, ... of the last depth, ``eval_loss_1``, ... of each."""
        found = {f"eval_{name}": value for name, value in self.depths[-1].values().items()}
        for depth in self.depths:
            found |= {f"eval_{name}_{depth.loops}": value for name, value in depth.values().items()}
        return found


@dataclass(frozen=True)
class HeldOut:
    """Held-out sequences, and of a task also problems.

    ``input_ids``, ``targets``: (sequences, n) int64. The targets are those of training, so a task's are its answers.
    """

    input_ids: Tensor
    targets: Tensor
    task: Task | None = None
    problems: Sequence[Example] = ()

    @classmethod
    def draw(cls, data: Mapping[str, Any], sequences: int, problems: int) -> HeldOut:
        """Draw from a run's ``data`` section; fewer where not so many are held out. Raises ValueError if none is."""
        given = dict(data)
        if (
            "task" not in given and "tokens" not in given
        ):  # a block of documents is read whole; read no more than needed
            buffer = given.get("shuffle_buffer")
            given["shuffle_buffer"] = min(buffer, sequences) if type(buffer) is int else buffer or sequences
        input_ids, targets = _one_epoch(make_batches(given, _SEED, held_out=True), sequences)
        if "task" not in given:
            return cls(input_ids, targets)
        task = make_task(**given)
        return cls(input_ids, targets, task, _problems(task, problems))

    def evaluate(
        self,
        model: Model,
        loops: Sequence[int],
        *,
        batch: int = 8,
        chunk_size: int | None = None,
        accelerator: Accelerator | None = None,
    ) -> Evaluation:
        """Evaluate a model with each number of ``loops``, ``batch`` sequences at once.

        ``chunk_size``: that in which a MELT reads (None: its own); answers are always written token by token. The
        processes of an ``accelerator`` share the work, and all of them must call this. Changes neither the model nor
        any random state.
        """
        index, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        mine = HeldOut(
            self.input_ids[index::processes], self.targets[index::processes], self.task, self.problems[index::processes]
        )
        training = model.training
        model.eval()
        try:
            rows = [mine._sums(model, number, batch, chunk_size) for number in loops]
        finally:
            model.train(training)
        sums = torch.tensor(rows, dtype=torch.float64, device=model.device)
        if accelerator is not None:
            sums = accelerator.reduce(sums, "sum")
        targets = int((self.targets != IGNORE).sum())
        depths = [
            DepthScore(number, loss / targets, right / len(self.problems) if self.problems else None)
            for number, (loss, right) in zip(loops, sums.tolist(), strict=True)
        ]
        return Evaluation(len(self.input_ids), targets, len(self.problems), tuple(depths))

    def _sums(self, model: Model, loops: int, batch: int, chunk_size: int | None) -> tuple[float, float]:
        """Return the sums of the cross-entropies and of the right answers."""
        loss, right = 0.0, 0.0
        for at in range(0, len(self.input_ids), batch):
            part = slice(at, at + batch)
            loss += cross_entropy(model, self.input_ids[part], self.targets[part], loops, chunk_size)[0]
        if self.task is not None and self.problems:
            names, at_once = self.task.vocabulary, max(batch, 100)  # decoding keeps no logits, so more fit
            score = exact_match(model, self.problems, names, num_loops=loops, chunk_size=chunk_size, batch=at_once)
            right = len(self.problems) * score.accuracy
        return loss, round(right)


def _one_epoch(batches: Batches, sequences: int) -> tuple[Tensor, Tensor]:
    """Take sequences until the stream begins anew, but at least one."""
    taken: list[Batch] = []
    while len(taken) < sequences:
        batch = batches.take(1, 1.0)
        if taken and batches.epoch:
            break
        taken.append(batch)
    return torch.cat([batch.input_ids for batch in taken]), torch.cat([batch.targets for batch in taken])


def _problems(task: Task, count: int) -> list[Example]:
    """Draw that many held-out problems, or half as many until there are enough."""
    while True:
        try:
            return task.test_set(count)
        except ValueError:
            if count <= 1:
                raise
            count //= 2
