"""One model after the other, one target after the other: what can run is checked and timed, what cannot says why."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from melt_models.errors import CheckpointError
from melt_runtime import Runtime
from melt_runtime.backends.choose import too_old
from melt_runtime.backends.devices import onnxruntime_version
from melt_runtime.backends.tensorrt import TensorRTBackend
from melt_runtime.errors import MeltError
from melt_runtime.machine import ONNX_RUNTIMES, installed_versions
from melt_runtime.package.reader import Package
from melt_runtime.progress import Step

from . import checks, timing
from .machine import Machine
from .report import FAILED, NOT_RUN, Report, Result
from .subjects import Plan, Subject, prepare, weight_bytes
from .targets import NotHere, Target, ready, targets

_DISTRIBUTIONS = (
    "melt-export",
    "torch",
    "numpy",
    "onnx",
    *ONNX_RUNTIMES,
    "onnxruntime-ep-nv-tensorrt-rtx-cu12",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "tensorrt",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
)


@dataclass(frozen=True)
class Options:
    """What to check. backends: their names; device: the NVIDIA device's index; torch_device: where PyTorch computes."""

    backends: tuple[str, ...]
    device: int = 0
    torch_device: str = "cpu"
    portable: bool = False
    quick: bool = False

    @property
    def decode_tokens(self) -> tuple[int, ...]:
        """Tokens in the cache for which a decoded token is timed."""
        return (128,) if self.quick else (128, 2000)

    @property
    def steps(self) -> int:
        """Steps of each timing."""
        return 8 if self.quick else 40

    @property
    def memory_tokens(self) -> int:
        """Tokens generated at each number of loops while memory is watched."""
        return 8 if self.quick else 32


def run(
    plans: list[Plan], checkpoint: Path | None, options: Options, machine: Machine, command: str, progress: Step
) -> Report:
    """Everything. What goes wrong on a target is a row, not an error."""
    began = time.perf_counter()
    wanted, installed = targets(options.backends, options.portable), onnxruntime_version()
    progress("bandwidth", 0, 0)
    report = Report(
        command=command,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine.facts(),
        versions=installed_versions(_DISTRIBUTIONS),
        bandwidth=machine.bandwidth((64 if options.quick else 512) << 20),
        quick=options.quick,
    )
    for plan in plans:
        with tempfile.TemporaryDirectory(prefix="melt-gpu-check-") as name:
            try:
                dialects = tuple(dict.fromkeys(t.dialect for t in wanted if not too_old(t.dialect, installed)))
                subject = prepare(plan, checkpoint, dialects, options.torch_device, Path(name), progress)
            except (MeltError, CheckpointError) as error:
                report.results.append(Result(plan.name, "", "export", FAILED, str(error)))
                continue
            _release()
            report.results += _reference(subject, options, report, progress)
            for target in wanted:
                progress(f"{plan.name}: {target.name}", 0, 0)
                report.results += check(subject, target, options, machine, report, progress)
                _release()
    report.seconds = time.perf_counter() - began
    return report


def check(
    subject: Subject, target: Target, options: Options, machine: Machine, report: Report, progress: Step
) -> list[Result]:
    """All rows of a model on a target."""
    row = checks.row_of(subject, target.name)
    old = too_old(target.dialect, onnxruntime_version())
    if old:
        return [row("all", NOT_RUN, old, {})]
    try:
        package = ready(
            target,
            Package.open(subject.packages[target.dialect], check_hashes=False),
            options.device,
            lambda step, total, done: progress(f"{subject.name}: {target.name}: {step}", total, done),
        )
    except NotHere as error:
        return [row("all", NOT_RUN, str(error), {})]
    except MeltError as error:
        return [row("build", FAILED, str(error), {})]
    try:
        runtime = Runtime.load(package.directory, backend=target.backend, device=options.device, check_hashes=False)
    except MeltError as error:
        return [row("load", FAILED, str(error), {})]

    rate, weights = report.bandwidth["bytes_per_second"], _weights(package, runtime)
    steps: list[tuple[str, Callable[[], list[Result]]]] = [
        ("states and logits", lambda: checks.parity(runtime, subject, row)),
        ("memory", lambda: [checks.flat_memory(runtime, machine, options.memory_tokens, row)]),
        ("graphs against plain runs", lambda: [_graphs(runtime, package, options, row)]),
    ]
    for count in sorted({min(count, runtime.manifest.max_seq_len - 1) for count in options.decode_tokens}):
        steps.append(
            ("decode", lambda n=count: [timing.decode(runtime, weights, n, options.steps, rate, row)])  # type: ignore[misc]
        )
    steps.append(("prefill", lambda: [timing.prefill(runtime, 4, max(2, options.steps // 4), row)]))
    results: list[Result] = []
    for name, step in steps:
        try:
            results += step()
        except MeltError as error:
            results.append(row(name, FAILED, str(error), {}))
    return results


def _graphs(runtime: Runtime, package: Package, options: Options, row: checks.Row) -> Result:
    """CUDA graphs against plain runs, where the backend has them."""
    backend = runtime.backend
    if not isinstance(backend, TensorRTBackend):
        return row("graphs against plain runs", NOT_RUN, f"{backend.name} captures no CUDA graphs", {})
    plain = TensorRTBackend(package, backend.engine, options.device, graphs=False, check_hashes=False)
    return checks.same_answers(runtime, Runtime(package, plain, None), 12, row)


def _reference(subject: Subject, options: Options, report: Report, progress: Step) -> list[Result]:
    """PyTorch's own times, to compare with."""
    row = checks.row_of(subject, f"PyTorch, eager, {options.torch_device}")
    progress(f"{subject.name}: PyTorch's times", 0, 0)
    package = Package.open(next(iter(subject.packages.values())), check_hashes=False)
    weights = (weight_bytes(package, "loop_step"), weight_bytes(package, "lm_head"))
    tokens = min(options.decode_tokens[0], subject.manifest.max_seq_len // 2)
    rate = report.bandwidth["bytes_per_second"]
    steps = max(2, options.steps // 4)
    found = timing.pytorch(
        subject.checkpoint, subject.manifest, options.torch_device, weights, tokens, 1, steps, rate, row
    )
    _release()
    return found


def _weights(package: Package, runtime: Runtime) -> tuple[int, int]:
    """Bytes of weights that a loop and the head read: an engine's plans hold little else."""
    if isinstance(runtime.backend, TensorRTBackend):
        files = runtime.backend.spec.files
        return files["loop_step"].bytes, files["lm_head"].bytes
    return weight_bytes(package, "loop_step"), weight_bytes(package, "lm_head")


def _release() -> None:
    """What the last step held, so that memory figures of the next are its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
