"""Functions that all benchmarks share: facts about the machine, packages with random weights, and Markdown."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from melt_runtime import machine as machine_facts

DOCS = Path(__file__).resolve().parent.parent / "docs"
INK, FAINT, GRID = "#24292f", "#6e7781", "#eaeef2"
# Settings of matplotlib for all plots.
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#afb8c1",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
}


def loaded_machine() -> dict[str, Any]:
    """Return facts about the machine, with the present load average. Call it before measuring."""
    return machine_facts.describe_machine()


def machine() -> dict[str, Any]:
    """Return facts about the machine that matter for figures, without its name."""
    return {name: fact for name, fact in loaded_machine().items() if name != "load_at_start"}


def versions(*libraries: str) -> dict[str, str]:
    """Return the versions of Python and of installed libraries. Raises PackageNotFoundError."""
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def command_line(script: str, arguments: list[str]) -> str:
    """Format a command for documents, with paths cut to file names."""
    shown = ["=".join(Path(p).name if p.startswith("/") else p for p in a.split("=")) for a in arguments]
    return f"python benchmarks/{script} {shlex.join(shown)}".rstrip()


def melt_export(checkpoint: Path, output: Path, rows: int, *options: str) -> Path:
    """Run melt-export for one sequence of ``rows`` tokens, unverified. Raises RuntimeError with its error."""
    command = [sys.executable, "-c", "from melt_export.entry_points import export; export()"]
    command += ["--checkpoint", str(checkpoint), "--output", str(output), "--max-seq-len", str(rows)]
    ran = subprocess.run(
        [*command, "--max-batch", "1", "--no-verify", *options], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or ["melt-export failed"])[-1])
    return output


def random_package(
    directory: Path, shape: dict[str, Any], options: dict[str, Any], named: str | None = None
) -> Iterator[str]:
    """Write ``directory/package``, a MELT with random weights, yielding a line before each step. For a child process.

    ``shape``: fields of the configuration, overriding those of the shape ``named``. ``options``: fields of
    ExportOptions.
    """
    from melt_models import MeltConfig
    from random_checkpoint import SHAPES, make

    from melt_export.export import ExportOptions, building

    yield "writing a checkpoint"
    make(directory / "checkpoint", MeltConfig(**{**(SHAPES[named].to_dict() if named else {}), **shape}))
    yield "exporting"
    with building(directory / "checkpoint", directory / "package", ExportOptions(**options)):
        pass


def resident(field: str) -> int:
    """Return bytes of this process's memory: "VmRSS" now, "VmHWM" at its peak.

    Raises OSError where the system lacks them.
    """
    size = machine_facts.resident(field)
    if size is None:
        raise OSError(f"this system does not tell {field}")
    return size


def save(path: Path, section: str, report: Any) -> None:
    """Write a section of a JSON file and keep the others."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content[section] = report
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table, the first column aligned left and the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def human(count: float) -> str:
    """Format bytes in decimal units."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def clock(seconds: float) -> str:
    """Format seconds as minutes: 163 -> "2:43"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def plural(count: int, noun: str, ending: str = "s") -> str:
    """Format a count with its noun: "1 layer", "2 layers"."""
    return f"{count} {noun}{ending * (count != 1)}"
