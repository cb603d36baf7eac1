"""Cost of building an engine: time, peak memory and size, with one process per build.

    python benchmarks/engine_build.py [--layers N] [--build fp16 --build fp16-int4 ...] [--json FILE]

Makes a random checkpoint in a real model's shape, exports it in the standard dialect and builds TensorRT-RTX engines,
which needs no GPU. With all layers (--layers 0) it needs 10 GB of memory and of disk, and a quiet machine:

    python benchmarks/engine_build.py --layers 0 --build fp16 --build fp16-int4 --json docs/benchmarks.json

``write_docs.py`` writes the JSON file's figures to docs/benchmarks.md. Runs on Linux (it reads /proc).
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from common import command_line, loaded_machine, resident, save, versions
from rich.console import Console
from rich.table import Table

BUILDS = ("fp16", "bf16", "fp32", "fp16-int4", "fp16-int8", "fp16-fp8")


@dataclass(frozen=True)
class Build:
    """Figures of one build.

    - ``peak_bytes``: peak resident memory of its process (VmHWM), ``start_bytes`` of which it had before the build.
    - ``plans``: bytes by graph.
    """

    name: str
    seconds: float
    peak_bytes: int
    start_bytes: int
    plans: dict[str, int]
    version: str


def export(checkpoint: Path, output: Path, precision: str, rows: int) -> None:
    """Export an unverified package in the standard dialect. For a child process."""
    import torch

    from melt_export.export import ExportOptions, building

    torch.set_num_threads(1)
    with building(checkpoint, output, ExportOptions(precision, "standard", rows)):
        pass


def build(package: Path, name: str, answer: Connection) -> None:
    """Build one engine and send a Build, without importing torch. For a child process."""
    from melt_runtime.engines.build import EngineOptions, build_engine
    from melt_runtime.package.reader import Package

    _, _, weights = name.partition("-")
    opened = Package.open(package, check_hashes=False)
    start = resident("VmHWM")
    began = time.perf_counter()
    spec = build_engine(opened, EngineOptions(weights=weights or None))
    seconds = time.perf_counter() - began
    plans = {graph: file.bytes for graph, file in spec.files.items()}
    answer.send(Build(name, seconds, resident("VmHWM"), start, plans, spec.version))


def in_child(function: Any, *arguments: Any) -> None:
    """Run a function in a fresh process. Raises RuntimeError if it fails."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"{function.__name__} ended with exit code {child.exitcode}")


def measure(shape: str, layers: int | None, builds: list[str], rows: int, directory: Path) -> list[Build]:
    """Make the checkpoint and the packages, and build one engine after the other."""
    from melt_models import MeltConfig
    from random_checkpoint import SHAPES, make

    fields = SHAPES[shape].to_dict()
    config = MeltConfig(**{**fields, "num_hidden_layers": layers or fields["num_hidden_layers"]})
    checkpoint = directory / "checkpoint"
    make(checkpoint, config)
    found = []
    for precision in dict.fromkeys(name.partition("-")[0] for name in builds):
        package = directory / precision
        in_child(export, checkpoint, package, precision, rows)
        for name in builds:
            if name.partition("-")[0] != precision:
                continue
            receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
            in_child(build, package, name, sender)
            found.append(receiver.recv())
            shutil.rmtree(package / "engines")
        shutil.rmtree(package)
    return found


def main(
    shape: Annotated[str, typer.Option(help="A shape of make_checkpoint.py.")] = "ouro-1.4b",
    layers: Annotated[int, typer.Option(help="Layers; 0: all of the shape.", min=0)] = 2,
    builds: Annotated[list[str] | None, typer.Option("--build", help=f"Any of {', '.join(BUILDS)}.")] = None,
    rows: Annotated[int, typer.Option(help="Tokens that the cache holds.", min=1)] = 4096,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the section 'engines' of this JSON file.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Work in this directory; default: a temporary one.")] = None,
) -> None:
    """Measure engine builds."""
    names = builds or ["fp16", "bf16", "fp32", "fp16-int4"]
    unknown = [name for name in names if name not in BUILDS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is not one of {', '.join(BUILDS)}")
    machine = loaded_machine()
    with tempfile.TemporaryDirectory(prefix="melt-engines-", dir=keep) as directory:
        found = measure(shape, layers or None, names, rows, Path(directory))
    table = Table("MB", "seconds", "peak", "before", *found[0].plans)
    for one in found:
        sizes = (one.peak_bytes, one.start_bytes, *one.plans.values())
        table.add_row(one.name, f"{one.seconds:.1f}", *(f"{size / 1e6:,.1f}" for size in sizes))
    Console().print(table)
    if json_file is not None:
        save(json_file, "engines", report(shape, layers, rows, machine, found))


def report(shape: str, layers: int, rows: int, machine: dict[str, Any], builds: list[Build]) -> dict[str, Any]:
    """Return the section of the JSON file.

    ``layers``: 0 for all of the shape. ``machine``: its facts before the first build.
    """
    from random_checkpoint import SHAPES

    return {
        "command": command_line("engine_build.py", sys.argv[1:]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine,
        "versions": {**versions("melt-export", "torch", "onnx"), "tensorrt-rtx": builds[0].version},
        "shape": shape,
        "layers": layers or SHAPES[shape].num_hidden_layers,
        "shape_layers": SHAPES[shape].num_hidden_layers,
        "rows": rows,
        "builds": [asdict(build) for build in builds],
    }


if __name__ == "__main__":
    typer.run(main)
