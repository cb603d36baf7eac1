"""``melt-run build-engine``: build a package's graphs as TensorRT plans on the machine that runs them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..engines.build import EngineOptions, build_engine, check_package, engine_name
from ..engines.library import open_library
from ..package.engine_spec import FLAVOURS, WEIGHTS, EngineSpec
from ..package.manifest import Manifest
from ..package.reader import Package
from ..progress import shown_progress
from .tables import engine_line, hash_progress

Flavour = StrEnum("Flavour", {name: name for name in FLAVOURS})  # type: ignore[misc]
Weights = StrEnum("Weights", {name: name for name in WEIGHTS})  # type: ignore[misc]

WeightsOption = Annotated[
    Weights | None,
    typer.Option(help="Store the loop step's weights in fewer bits; default: as the package has them."),
]
CapabilityOption = Annotated[
    list[str] | None,
    typer.Option(
        help="For tensorrt-rtx, a device to build for, such as 8.9; may be given several times. "
        "Default: Ampere and newer."
    ),
]


def build_engine_command(
    package: Annotated[Path, typer.Argument(help="The directory of a package in the standard or portable dialect.")],
    engine: Annotated[Flavour, typer.Option(help="The library that builds and runs it.")],
    weights: WeightsOption = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Most sequences that run together; default: the package's.")
    ] = None,
    compute_capability: CapabilityOption = None,
    workspace: Annotated[
        int | None, typer.Option(help="Most scratch memory, in MiB; default: the library's choice.")
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Allow weights in host memory, copied when needed.")
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="For tensorrt, a file of kernel timings to use and extend.")
    ] = None,
) -> None:
    """Build an engine into a package, in place of one of the same name. TensorRT-RTX needs no GPU for this."""
    options = EngineOptions(
        flavour=str(engine),
        weights=None if weights is None else str(weights),
        max_batch=max_batch,
        compute_capabilities=tuple(compute_capability or ()),
        workspace=workspace,
        weight_streaming=weight_streaming,
        timing_cache=timing_cache,
    )
    library = open_library(options.flavour)
    check_package(Package.open(package, check_hashes=False).manifest, options, library)
    with hash_progress(package) as progress:
        opened = Package.open(package, progress=progress)
    with shown_progress() as step:
        spec = build_engine(opened, options, step)
    print(built_line(opened.manifest, options, spec))


def built_line(manifest: Manifest, options: EngineOptions, spec: EngineSpec) -> str:
    """Describe the built engine in a line."""
    return f"engine {engine_name(options, manifest.precision)}: {engine_line(spec)}"
