"""Parity, memory and time of packages on every backend of a machine with an NVIDIA GPU, in less than ten minutes.

    python benchmarks/gpu.py [--quick] [--portable] [--backend NAME] [--json docs/hardware.json]

Each model is a random checkpoint (or one that is given), exported in the dialects that the backends take, with engines
for the flavours of TensorRT that are installed. melt-verify's comparison comes first; then memory over loops, and times
beside PyTorch's and beside the time that the memory's bandwidth alone allows. What cannot run here is listed with its
reason. ``--backend onnxruntime`` tries all this on the CPU.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import command_line
from gpu_timing import bandwidth, facts, memory_used, pytorch_times, times, weight_bytes
from melt_models import MeltConfig
from melt_models.errors import CheckpointError
from melt_runtime import LoopSettings, Runtime
from melt_runtime.backends.choose import NAMES, too_old
from melt_runtime.backends.cuda import Device, open_device
from melt_runtime.backends.devices import onnxruntime_version
from melt_runtime.cli.errors import run_app
from melt_runtime.engines.build import EngineOptions, build_engine, check_package
from melt_runtime.engines.library import open_library
from melt_runtime.engines.store import remove_engine
from melt_runtime.errors import ArgumentError, MeltError
from melt_runtime.machine import ONNX_RUNTIMES, installed_versions
from melt_runtime.package.engine_spec import FLAVOURS
from melt_runtime.package.reader import Package
from melt_runtime.package.specs import PRECISIONS
from melt_runtime.progress import Step, shown_progress
from random_checkpoint import SHAPES, make
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from melt_export.export import building
from melt_export.options import ExportOptions
from melt_export.parity.target import CPU, target_of
from melt_export.parity.verify import verify

PASSED, FAILED, MEASURED, NOT_RUN = "passed", "failed", "measured", "not run"
ON_DEVICE = tuple(name for name in NAMES if name != CPU)
LOOPS = (1, 4, 16)
_SLACK_BYTES = 8 << 20  # what a driver or an allocator may take at once, whatever the model
_SLACK_SHARE = 0.01  # of what a LoopLM's caches would grow by
_LIBRARIES = (
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
ADDITION = {
    "vocab_size": 14,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "chunk_size": 16,
    "max_position_embeddings": 256,
    "total_ut_steps": 4,
}


@dataclass(frozen=True)
class Model:
    """A model to measure: a configuration, or None for a checkpoint that is given; greedy ``tokens`` per prompt."""

    name: str
    precision: str
    config: MeltConfig | None
    rows: int | None
    tokens: int


@dataclass(frozen=True)
class Target:
    """A backend, the dialect of the package that it runs, and the flavour of its engine."""

    backend: str
    dialect: str
    flavour: str | None = None

    @property
    def name(self) -> str:
        """ "tensorrt (tensorrt-rtx), standard"."""
        return f"{self.backend}{f' ({self.flavour})' if self.flavour else ''}, {self.dialect}"


@dataclass(frozen=True)
class Row:
    """One check or measurement: its model and target, its ``state``, and the figures behind the ``detail``."""

    model: str
    target: str
    check: str
    state: str
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What is run, and how long. ``device``: None for the host."""

    targets: tuple[Target, ...]
    device: Device | None
    index: int
    quick: bool

    @property
    def torch_device(self) -> str:
        """Where PyTorch is timed."""
        return f"cuda:{self.index}" if self.device is not None and torch.cuda.is_available() else "cpu"

    @property
    def steps(self) -> int:
        """Steps per timing of a decoded token."""
        return 8 if self.quick else 40


def own_models(quick: bool) -> dict[str, Model]:
    """Return the models that need no checkpoint, by name."""
    layers, vocabulary, rows = (2, 8192, 1024) if quick else (4, 49152, 4096)
    slice_of = {**SHAPES["ouro-1.4b"].to_dict(), "num_hidden_layers": layers, "vocab_size": vocabulary}
    return {
        "addition": Model("addition demo's shape, fp32", "fp32", MeltConfig(**ADDITION), None, 12 if quick else 48),
        "ouro-slice": Model(
            f"{layers} layers of Ouro-1.4B's shape, fp16", "fp16", MeltConfig(**slice_of), rows, 2 if quick else 12
        ),
    }


def targets_of(backends: tuple[str, ...], portable: bool) -> tuple[Target, ...]:
    """Return what is to be tried. Raises ArgumentError for an unknown backend."""
    found = []
    for backend in backends:
        if backend not in NAMES:
            raise ArgumentError(f"backend {backend!r} is not one of {', '.join(NAMES)}")
        dialects = ("onnxruntime", "standard") if backend in (CPU, "onnxruntime-cuda") else ("standard",)
        for dialect in dialects + (("portable",) if portable else ()):
            found += [Target(backend, dialect, flavour) for flavour in (FLAVOURS if backend == "tensorrt" else (None,))]
    return tuple(found)


# What is checked and measured on a target


def parity(package: Package, checkpoint: Path, target: Target, index: int, tokens: int) -> Iterator[tuple[Any, ...]]:
    """Compare every loop, exit depths and greedy tokens with PyTorch, as melt-verify does."""
    report = verify(package.directory, checkpoint, backend=target.backend, device=index, tokens=tokens)
    greedy = [failure for failure in report.failures() if failure.startswith("greedy")]
    rest = [failure for failure in report.failures() if failure not in greedy]
    detail = (
        f"worst relative error {report.error()} over {report.loops} loops, "
        f"KL {report.kl_mean:.1e}, exit depths {report.exit_same_depth}/{report.exit_tokens}"
    )
    yield "states and logits", FAILED if rest else PASSED, "; ".join(rest[:3]) or detail, asdict(report)
    same, count = sum(run.same for run in report.generations), sum(run.tokens for run in report.generations)
    must = "must be all" if report.tolerance.same_tokens else f"in {report.precision} they may part"
    detail = f"{same} of {count} the same as PyTorch's ({must})"
    yield "greedy tokens", FAILED if greedy else PASSED, detail, {"same": same, "tokens": count}


def flat_memory(runtime: Runtime, used: Callable[[], int], tokens: int) -> tuple[Any, ...]:
    """Check that generating with 16 loops takes no more memory than with 1, where a LoopLM would add caches."""
    driver, manifest = runtime.driver(), runtime.manifest
    prompt = [list(range(min(4, manifest.vocab_size)))]

    def generate(loops: int) -> int:
        driver.reset()
        logits = driver.append(prompt, LoopSettings(loops))
        for _ in range(min(tokens, driver.capacity - len(prompt[0]))):
            logits = driver.append([[int(logits[0].argmax())]], LoopSettings(loops))
        return used()

    generate(1)  # what is allocated at first use, at any depth
    found = {loops: generate(loops) for loops in LOOPS}
    grown, caches = max(found.values()) - found[1], (LOOPS[-1] - 1) * manifest.cache_bytes(manifest.cache_rows)
    limit, state = int(max(_SLACK_SHARE * caches, _SLACK_BYTES)), driver.state.state_bytes
    figures = {
        "used_bytes": found,
        "state_bytes": state,
        "grown_bytes": grown,
        "limit_bytes": limit,
        "looplm_would_add_bytes": caches,
    }
    detail = (
        f"{grown / 1e6:+.1f} MB from 1 to 16 loops (limit {limit / 1e6:.1f} MB; a LoopLM's caches would add "
        f"{caches / 1e6:,.1f} MB); state {state / 1e6:,.1f} MB"
    )
    return "memory", PASSED if grown <= limit else FAILED, detail, figures


# Models and targets, one after the other


def built(package: Package, target: Target, index: int, step: Step) -> tuple[Package | None, str]:
    """Return the package with the target's engine in it, or None and why it cannot run here.

    Raises MeltError where a build fails.
    """
    try:
        if target.flavour is not None:
            check_package(package.manifest, EngineOptions(target.flavour), open_library(target.flavour))
        else:
            target_of(package, target.backend, index)
    except MeltError as error:
        return None, str(error)
    for name in package.manifest.engines:  # of another flavour: the one that is tested must be the one that runs
        remove_engine(package.directory, name)
    if target.flavour is not None:
        build_engine(package, EngineOptions(target.flavour), step)
    package = Package.open(package.directory, check_hashes=False)
    try:
        target_of(package, target.backend, index)
    except MeltError as error:
        return None, str(error)
    return package, ""


def rows_of(
    model: Model, checkpoint: Path, directory: Path, settings: Settings, rate: float, step: Step
) -> Iterator[Row]:
    """Export a model in every dialect, time PyTorch, and yield the rows of every target."""
    old = {target.dialect: too_old(target.dialect, onnxruntime_version()) for target in settings.targets}
    packages: dict[str, Package] = {}
    for dialect in (name for name, reason in old.items() if not reason):
        try:
            options = ExportOptions(model.precision, dialect, model.rows, max_batch=3)
            with building(checkpoint, directory / dialect, options, progress=step):
                pass
        except (MeltError, CheckpointError) as error:
            yield Row(model.name, dialect, "export", FAILED, str(error))
            continue
        packages[dialect] = Package.open(directory / dialect, check_hashes=False)
    for package in list(packages.values())[:1]:
        device, steps = settings.torch_device, max(2, settings.steps // 4)
        for check, *found in pytorch_times(checkpoint, package.manifest, device, weight_bytes(package), rate, steps):
            yield Row(model.name, f"PyTorch, eager, {device}", check, MEASURED, *found)
    for target in settings.targets:
        gc.collect()  # so that memory figures are the target's own
        torch.cuda.empty_cache()
        step(f"{model.name}: {target.name}", 0, 0)
        if reason := old[target.dialect]:
            yield Row(model.name, target.name, "all", NOT_RUN, reason)
        elif target.dialect in packages:
            yield from target_rows(model, checkpoint, packages[target.dialect], target, settings, rate, step)


def target_rows(
    model: Model, checkpoint: Path, package: Package, target: Target, settings: Settings, rate: float, step: Step
) -> Iterator[Row]:
    """Check and measure one package on one target. What fails is a row, and ends the target."""
    try:
        ready, reason = built(package, target, settings.index, step)
        if ready is None:
            yield Row(model.name, target.name, "all", NOT_RUN, reason)
            return
        for found in parity(ready, checkpoint, target, settings.index, model.tokens):
            yield Row(model.name, target.name, *found)
        runtime = target_of(ready, target.backend, settings.index).load()
        used = flat_memory(runtime, lambda: memory_used(settings.device), 8 if settings.quick else 32)
        yield Row(model.name, target.name, *used)
        cached = (128,) if settings.quick else (128, 2000)
        for check, *measured in times(runtime, weight_bytes(ready), rate, cached, settings.steps):
            yield Row(model.name, target.name, check, MEASURED, *measured)
    except MeltError as error:
        yield Row(model.name, target.name, "all", FAILED, str(error))


def verdict(rows: list[Row], seconds: float) -> tuple[bool, str]:
    """Return whether something was checked and all of it holds, and a sentence that says so."""
    passed, failed, not_run = (sum(row.state == state for row in rows) for state in (PASSED, FAILED, NOT_RUN))
    tail = f"{passed} passed, {failed} failed, {not_run} not run, {seconds:.0f} s"
    if failed:
        return False, f"FAILED: {tail}"
    return passed > 0, f"passed: {tail}" if passed else f"nothing could be checked: {tail}"


def show(record: dict[str, Any], rows: list[Row], console: Console) -> None:
    """Print machine, versions, bandwidth and a table of the rows."""
    for part in ("machine", "versions"):
        console.print(Text(", ".join(f"{name} {value}" for name, value in record[part].items())))
    rate, how = record["bandwidth"]["bytes_per_second"], record["bandwidth"]["how"]
    console.print(Text(f"bandwidth {rate / 1e9:,.0f} GB/s ({how})"))
    table = Table("model", "run by", "check", "", "", box=box.SIMPLE_HEAD, header_style="cyan")
    styles = {PASSED: "green", FAILED: "bold red", MEASURED: "", NOT_RUN: "yellow"}
    before: tuple[str, str] | None = None
    for row in rows:
        shown = ("", "") if before == (row.model, row.target) else (row.model, row.target)
        table.add_row(*map(Text, (*shown, row.check)), Text(row.state, style=styles[row.state]), Text(row.detail))
        before = (row.model, row.target)
    console.print(table)


def main(
    checkpoint: Annotated[
        Path | None, typer.Option(help="This MELT checkpoint, in place of random ones.", exists=True, file_okay=False)
    ] = None,
    precision: Annotated[str, typer.Option(help=f"Of --checkpoint's packages: {', '.join(PRECISIONS)}.")] = "fp16",
    model: Annotated[list[str] | None, typer.Option(help="Only this model: addition, ouro-slice.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help=f"Only this backend, of {', '.join(NAMES)}.")] = None,
    device: Annotated[int, typer.Option(help="The NVIDIA device, by index.", min=0)] = 0,
    portable: Annotated[bool, typer.Option("--portable", help="The portable dialect, too.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller models and fewer steps; a minute or two.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Check and time what runs MELT packages on this machine's NVIDIA GPU. Exit code 1 if something fails."""
    backends = tuple(dict.fromkeys(backend or ON_DEVICE))
    targets = targets_of(backends, portable)
    models = chosen_models(checkpoint, precision, model, quick)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ArgumentError(f"there is no directory {json_file.absolute().parent} for --json")
    opened = open_device(device) if set(backends) & set(ON_DEVICE) else None
    settings, began, rows = Settings(targets, opened, device, quick), time.perf_counter(), []
    record: dict[str, Any] = {
        "command": command_line("gpu.py", sys.argv[1:]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": facts(opened),
        "versions": installed_versions(_LIBRARIES),
        "bandwidth": bandwidth(opened, (64 if quick else 512) << 20),
        "quick": quick,
    }
    with shown_progress() as step:
        for one in models:
            with tempfile.TemporaryDirectory(prefix="melt-gpu-") as name:
                source = checkpoint or Path(name) / "checkpoint"
                if one.config is not None:
                    make(source, one.config, progress=step)
                rate = record["bandwidth"]["bytes_per_second"]
                rows += rows_of(one, source, Path(name), settings, rate, step)
    seconds = time.perf_counter() - began
    passed, sentence = verdict(rows, seconds)
    console = Console(soft_wrap=not sys.stdout.isatty())
    show(record, rows, console)
    console.print(Text(sentence, style="bold"))
    if json_file is not None:
        content = {"passed": passed, **record, "results": [asdict(row) for row in rows], "seconds": seconds}
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if not passed:
        raise typer.Exit(1)


def chosen_models(checkpoint: Path | None, precision: str, names: list[str] | None, quick: bool) -> list[Model]:
    """Return the models to run. Raises ArgumentError."""
    own = own_models(quick)
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    unknown = next((name for name in names or () if name not in own), None)
    if unknown is not None:
        raise ArgumentError(f"model {unknown!r} is not one of {', '.join(own)}")
    if checkpoint is None:
        return [own[name] for name in names or own]
    if names:
        raise ArgumentError("--model and --checkpoint exclude each other")
    return [Model(f"{checkpoint.resolve().name}, {precision}", precision, None, None, 4 if quick else 16)]


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(main)
    run_app(app, "gpu", (MeltError, CheckpointError, OSError))
