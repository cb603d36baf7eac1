"""The command ``python -m melt_export.gpu_check``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from melt_models.errors import CheckpointError
from melt_runtime.backends.devices import devices
from melt_runtime.cli.errors import run_app
from melt_runtime.errors import ArgumentError, BackendError
from melt_runtime.package.specs import PRECISIONS
from melt_runtime.progress import shown_progress
from rich.console import Console

from .machine import CudaMachine, HostMachine, Machine
from .run import Options, run
from .subjects import MODELS, Plan, plans
from .targets import ON_DEVICE, targets

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    epilog="Exit code 0: all that could run passed; 1: something did not; 2: there is no device, or a mistake."
)
def gpu_check(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Check this MELT checkpoint; default: random ones of its own.")
    ] = None,
    precision: Annotated[str, typer.Option(help=f"Of --checkpoint's packages: {', '.join(PRECISIONS)}.")] = "fp16",
    model: Annotated[list[str] | None, typer.Option(help=f"Only this of its own models: {', '.join(MODELS)}.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only this backend, of {', '.join(ON_DEVICE)}; or onnxruntime, the CPU, to try the checks themselves."
        ),
    ] = None,
    device: Annotated[int, typer.Option(help="The NVIDIA device, by index.", min=0)] = 0,
    portable: Annotated[bool, typer.Option("--portable", help="The portable dialect, too.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller models and fewer steps; a minute or two.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Check and time everything that runs MELT packages on this machine's NVIDIA GPU.

    Exports packages, builds engines for the flavours of TensorRT that are installed, and compares PyTorch, ONNX
    Runtime and TensorRT at every loop. Less than ten minutes.
    """
    backends = tuple(dict.fromkeys(backend or ON_DEVICE))
    targets(backends, portable)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ArgumentError(f"there is no directory {json_file.absolute().parent} for --json")
    subjects = _plans(checkpoint, precision, model, quick)
    machine = _machine(backends, device)
    on_cuda = torch.cuda.is_available() and isinstance(machine, CudaMachine)
    options = Options(backends, device, f"cuda:{device}" if on_cuda else "cpu", portable, quick)
    with shown_progress() as step:
        report = run(subjects, checkpoint, options, machine, _command(sys.argv[1:]), step)
    report.show(Console(soft_wrap=not sys.stdout.isatty()))
    if json_file is not None:
        report.write(json_file)
    if not report.passed:
        raise typer.Exit(1)


def _plans(checkpoint: Path | None, precision: str, names: list[str] | None, quick: bool) -> list[Plan]:
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    unknown = next((name for name in names or () if name not in MODELS), None)
    if unknown is not None:
        raise ArgumentError(f"model {unknown!r} is not one of {', '.join(MODELS)}")
    if checkpoint is None:
        return plans(names or MODELS, quick)
    if names:
        raise ArgumentError("--model and --checkpoint exclude each other")
    if not checkpoint.is_dir():
        raise ArgumentError(f"checkpoint {checkpoint} is not a directory")
    return [Plan(f"{checkpoint.resolve().name}, {precision}", precision, None, None, 4 if quick else 16)]


def _machine(backends: tuple[str, ...], device: int) -> Machine:
    """The device, or the host where nothing else is asked for. Raises BackendError where there is no driver."""
    if not set(backends) & set(ON_DEVICE):
        return HostMachine()
    if not devices():
        raise BackendError("there is no NVIDIA driver with a device here, so there is no GPU to check")
    return CudaMachine(device)


def _command(arguments: list[str]) -> str:
    """The command line, with nothing of this machine's paths in it."""
    shown = [Path(a).name if a.startswith("/") else a for a in arguments]
    return " ".join(["python -m melt_export.gpu_check", *shown])


if __name__ == "__main__":
    run_app(app, "gpu_check", (CheckpointError,))
