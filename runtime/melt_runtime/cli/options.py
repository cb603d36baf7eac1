"""Options shared by several commands of melt-run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..backends.choose import NAMES

PackageDirectory = Annotated[Path, typer.Argument(help="The package directory that melt-export wrote.")]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with on the CPU; default: the physical cores.")]
BackendName = Annotated[
    str, typer.Option(help=f"What runs the package: {', '.join(NAMES)} (the CPU); auto takes the best that can here.")
]
DeviceIndex = Annotated[int, typer.Option(help="The NVIDIA device to run on, by index.", min=0)]
Expect = Annotated[
    str | None, typer.Option(help="Refuse a package of another hash than this; melt-run inspect shows a package's.")
]
