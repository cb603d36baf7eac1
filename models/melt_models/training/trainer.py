"""The training loop, for one device and for several under ``accelerate launch``."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from .config import StageConfig
from .data import IGNORE, Batch, Batches
from .errors import ConfigError, TrainingDivergedError
from .held_out import Evaluation, HeldOut
from .metrics import Recorder
from .objectives import DistillOptions, Objective, StepSize
from .snapshots import Position, Snapshots, Trained

_GATE = ".latent_gate."


class Finished(NamedTuple):
    """Weights at the end of a stage, whole, on the main process; and their quality, if there are held-out data."""

    weights: dict[str, Tensor]
    evaluation: Evaluation | None


def make_accelerator(precision: str = "fp32") -> Accelerator:
    """Return the devices of this run. Raises ConfigError where the hardware has no bf16.

    ``tf32`` multiplies float32 matrices in the reduced precision of NVIDIA's matrix units, where there are any.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    wanted = "bf16" if precision == "bf16" else "no"
    if wanted == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"precision is bf16, which {torch.cuda.get_device_name()} does not compute in; use fp32")
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    return Accelerator(mixed_precision=wanted)


def rate_at(config: StageConfig, step: int) -> float:
    """Return the factor on every learning rate in a step, counted from 0: warm-up, then the schedule."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    done = step / max(config.steps, 1)
    if config.schedule == "flat-cosine":
        done = max(0.0, 2 * done - 1)
    if config.schedule == "constant":
        return warm
    return warm * (config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizers(model: nn.Module, config: StageConfig) -> list[torch.optim.Optimizer]:
    """Make AdamW for all weights, or Muon for the layers' matrices and AdamW for the rest. Gates have groups of their
    own."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = config.optimizer == "muon" and parameter.ndim == 2 and ".layers." in name
            groups.setdefault((matrix, _GATE in name), []).append(parameter)
    rates = {False: config.learning_rate, True: config.matrix_learning_rate}

    def made(matrix: bool) -> list[dict[str, Any]]:
        return [
            {"params": parameters, "lr": (gate and config.gate_learning_rate) or rates[matrix], "gate": gate}
            for (is_matrix, gate), parameters in groups.items()
            if is_matrix == matrix
        ]

    optimizers: list[torch.optim.Optimizer] = []
    if made(False):
        optimizers.append(torch.optim.AdamW(made(False), betas=config.betas, weight_decay=config.weight_decay))
    if made(True):
        optimizers.append(torch.optim.Muon(made(True), momentum=0.95, weight_decay=config.weight_decay))
    return optimizers


def train(
    objective: Objective,
    batches: Batches,
    config: StageConfig,
    *,
    accelerator: Accelerator,
    stage: str,
    state: Path,
    metrics: Path,
    settings: Mapping[str, Any],
    held_out: HeldOut | None = None,
    resume: bool = False,
) -> Finished:
    """Train ``objective.model``, and evaluate it on ``held_out`` every ``eval_every`` steps and at the end.

    ``state`` is the directory of snapshots; ``metrics`` that of the file ``<stage>.jsonl``. ``settings`` are everything
    that the result depends on: ``resume`` refuses a snapshot with other settings. Raises TrainingDivergedError,
    SnapshotError, ConfigError.
    """
    if config.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"batch_size is {config.batch_size}, which {accelerator.num_processes} processes cannot share"
        )
    if accelerator.distributed_type == DistributedType.FSDP and config.optimizer == "muon":
        raise ConfigError("optimizer is muon, which needs whole matrices and FSDP shards them; use adamw")
    snapshots = Snapshots(state, settings, accelerator)
    snapshots.open(resume=resume)
    options: Any = objective.options
    # Parameters may lack gradients: the exit gate without its loss, and the latent gate while alpha is 0.
    unused = isinstance(options, DistillOptions) and (not options.exit_weight or options.interpolation != "none")
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
    prepared, *optimizers = accelerator.prepare(objective, *make_optimizers(objective, config))
    trained = Trained(prepared, optimizers, accelerator)
    held_out = None if trained.sharded else held_out
    evaluation: Evaluation | None = None
    loop = _Loop(objective, trained, config)
    at = Position()
    if resume:
        at = snapshots.load(trained)
        if at.data is not None:
            batches.load_state_dict(at.data)
    recorder = Recorder(metrics, stage, at.step, config.steps) if accelerator.is_main_process else None
    objective.train()
    begun, tokens = time.monotonic() - at.seconds, at.tokens
    try:
        for step in range(at.step, config.steps):
            batch = _take(batches, config.batch_size, step / config.steps)
            tokens += batch.input_ids.numel()
            figures = loop.step(step, batch.input_ids, batch.targets)
            done, seconds = step + 1, time.monotonic() - begun
            figures |= {"tokens": tokens, "seconds": round(seconds, 3)}
            last = done == config.steps
            save = last or done % config.save_every == 0
            due = last or (config.eval_every and done % config.eval_every == 0)
            if save:
                loop.check_weights(done)
            evaluation = loop.evaluate(done, held_out) if held_out is not None and due else None
            if recorder is not None:
                recorder.step(done, figures, evaluation, log=last or done % config.log_every == 0)
            if save:
                if recorder is not None:
                    recorder.sync()
                snapshots.save(trained, Position(done, tokens, seconds, batches.state_dict()))
        if evaluation is None and held_out is not None:  # resumed after the last step
            evaluation = loop.evaluate(config.steps, held_out)
        return Finished(trained.model_state(), evaluation)
    finally:
        if recorder is not None:
            recorder.close()
        accelerator.free_memory()


def _take(batches: Batches, size: int, progress: float) -> Batch:
    try:
        return batches.take(size, progress)
    except ValueError as error:  # faults that show only while files are read
        raise ConfigError(f"section data: {error}") from error


class _Loop:
    """Optimiser steps: gradients of this process's share of the batch, micro-batch by micro-batch, then the update."""

    def __init__(self, objective: Objective, trained: Trained, config: StageConfig):
        self.objective, self.trained, self.config, self.accelerator = objective, trained, config, trained.accelerator
        self.rates = [[group["lr"] for group in one.param_groups] for one in trained.optimizers]

    def step(self, step: int, input_ids: Tensor, targets: Tensor) -> dict[str, float]:
        """Run one step and return its figures. input_ids, targets: (batch, n), of all processes. Raises
        TrainingDivergedError."""
        config, accelerator = self.config, self.accelerator
        factor = rate_at(config, step)
        for optimizer, rates in zip(self.trained.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad()
        parts = self._gradients(step, input_ids, targets)
        largest = self._largest([p.grad for p in self.trained.objective.parameters()])
        norm = accelerator.clip_grad_norm_(self.trained.objective.parameters(), config.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        figures = {**parts, **self._learning_rates(), "gradient_norm": norm}
        if not math.isfinite(norm) or not all(map(math.isfinite, parts.values())):
            raise TrainingDivergedError(self._what_diverged(step + 1, parts, norm, largest))
        for optimizer in self.trained.optimizers:
            optimizer.step()
        return figures

    def evaluate(self, done: int, held_out: HeldOut) -> Evaluation:
        """Evaluate the model after ``done`` steps at each of its depths. Raises TrainingDivergedError."""
        model, accelerator = self.objective.model, self.accelerator
        batch = self.config.micro_batch or max(1, self.config.batch_size // accelerator.num_processes)
        depths = range(1, model.config.total_ut_steps + 1)
        evaluation = held_out.evaluate(model, depths, batch=batch, accelerator=accelerator)
        if not evaluation.finite:
            losses = ", ".join(f"{depth.loss:g}" for depth in evaluation.depths)
            raise TrainingDivergedError(
                f"training diverged in step {done}: the held-out losses after it are {losses}; "
                "the last good snapshot is kept"
            )
        return evaluation

    def check_weights(self, done: int) -> None:
        """Raise TrainingDivergedError if a weight is not finite after ``done`` steps."""
        name, worst = self._worst(self._largest([p.detach() for p in self.trained.objective.parameters()]))
        if not math.isfinite(worst):
            raise TrainingDivergedError(
                f"training diverged in step {done}: after it {name} holds {worst:g}; the last good snapshot is kept"
            )

    def _gradients(self, step: int, input_ids: Tensor, targets: Tensor) -> dict[str, float]:
        """Add up the gradients of this process's sequences. Returns the loss and its parts, averaged over all
        processes."""
        config, accelerator = self.config, self.accelerator
        processes, share = accelerator.num_processes, len(input_ids) // accelerator.num_processes
        size = StepSize(max(1, int((targets != IGNORE).sum())) / processes, len(input_ids) / processes)
        mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        input_ids, targets = (x[mine].to(accelerator.device) for x in (input_ids, targets))
        micro = config.micro_batch or share
        spans = self.objective.spans(input_ids.shape[1])
        pieces = [(slice(at, at + micro), span) for at in range(0, share, micro) for span in spans]
        sums: dict[str, Tensor] = {}
        for index, (rows, span) in enumerate(pieces):
            last = index == len(pieces) - 1
            with nullcontext() if last else accelerator.no_sync(self.trained.objective):
                losses = self.trained.objective(input_ids[rows], targets[rows], size, step, config.steps, span)
                accelerator.backward(losses.total)
            for name, value in {"loss": losses.total.detach(), **losses.parts}.items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()
        means = accelerator.reduce(torch.stack(list(sums.values())), "mean").tolist()
        return dict(zip(sums, means, strict=True))

    def _learning_rates(self) -> dict[str, float]:
        groups = [group for optimizer in self.trained.optimizers for group in optimizer.param_groups]
        kinds = {id(group): "gate_learning_rate" if group["gate"] else "learning_rate" for group in groups}
        named: dict[str, float] = {}
        for group in groups:
            name = kinds[id(group)]
            named.setdefault(f"matrix_{name}" if "ns_steps" in group else name, group["lr"])
        return named

    def _largest(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the largest magnitude in each tensor, (tensors,), of this process's shards; 0 where there is none."""
        local = [None if g is None else g.to_local() if hasattr(g, "to_local") else g for g in tensors]
        present = [g for g in local if g is not None and g.numel()]
        norms = iter(torch._foreach_norm(present, math.inf) if present else [])
        zero = torch.zeros((), device=self.accelerator.device)
        return torch.stack([zero if g is None or not g.numel() else next(norms).to(zero) for g in local])

    def _worst(self, largest: Tensor) -> tuple[str, float]:
        """Return the name and value of the largest magnitude of all processes. largest: (parameters,). Every process
        must call this."""
        names = [name.removeprefix("module.") for name, _ in self.trained.objective.named_parameters()]
        values = self.accelerator.gather(largest[None]).cpu()
        order = values.nan_to_num(nan=math.inf).amax(0)
        # Among values that are not finite, a NaN is named before an Inf.
        order = torch.where(values.isnan().any(0), math.inf, order.clamp(max=torch.finfo(order.dtype).max))
        at = int(order.argmax())
        return names[at], math.nan if values[:, at].isnan().any() else float(values[:, at].max())

    def _what_diverged(self, step: int, parts: Mapping[str, float], norm: float, largest: Tensor) -> str:
        name, worst = self._worst(largest)
        shown = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        return (
            f"training diverged in step {step}: {shown}, gradient norm {norm:g}; "
            f"the largest gradient is {name}'s, {worst:g}; the last good snapshot is kept"
        )
