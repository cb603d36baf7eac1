"""``melt-run bench``: measure how fast packages run here."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..bench.sweep import Sweep, bench
from ..errors import ArgumentError
from ..machine import ONNX_RUNTIMES, describe_machine, installed_versions
from ..progress import shown_progress
from .options import fetched

_WIDTH = 200  # characters of a table that is not shown on a terminal
_LIBRARIES = ("melt-export", *ONNX_RUNTIMES, "numpy")


def bench_command(
    package: Annotated[Path, typer.Argument(help="The package to measure: a directory, or org/name on a hub.")],
    against: Annotated[
        list[Path] | None, typer.Option(help="A package to compare with, run in turn; may be given several times.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    context: Annotated[str, typer.Option(help="Tokens in the cache before the timed ones, such as 0,512,2048.")] = "0",
    loops: Annotated[str, typer.Option(help="Loops per token, such as 1,2,4. Default: each package's.")] = "",
    batch: Annotated[str, typer.Option(help="Sequences at a time, such as 1,4.")] = "1",
    chunk: Annotated[str, typer.Option(help="Prefill chunks, such as 32,128. Default: each package's.")] = "",
    threads: Annotated[str, typer.Option(help="Threads, such as 1,2. Default: as melt-run generate.")] = "",
    busy: Annotated[
        str, typer.Option(help="Processes that compute beside and end with it, such as 0,1. Default: none.")
    ] = "0",
    pipeline: Annotated[
        str,
        typer.Option(
            help="Ways to decode, such as off,on: greedily from the package's example prompt, as long as the context, "
            "with several successive tokens at once or not. Default: plain tokens after a context that was not run."
        ),
    ] = "",
    prompt: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the prompt whose prefill is timed; 0: none. Default: 128, or what all packages hold."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens decoded at each visit. Default: 4, or 32 with --pipeline.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Visits to each combination, packages in turn.")] = 5,
) -> None:
    """Measure speed, bytes and memory of a package, and of others in turn with it.

    Every combination of the lists is run. Bandwidth is what this machine reads with as many threads, measured first and
    again before each visit.
    """
    sweep = Sweep(
        contexts=_numbers("context", context),
        loops=_numbers("loops", loops),
        batches=_numbers("batch", batch),
        chunks=_numbers("chunk", chunk),
        threads=_numbers("threads", threads),
        busy=_numbers("busy", busy),
        pipelines=_words(pipeline),
        prompt=prompt,
        tokens=(32 if pipeline else 4) if tokens is None else tokens,
        rounds=rounds,
    )
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise ArgumentError(f"{json_file} cannot be written: its directory does not exist")
    packages = [fetched(one) for one in (package, *(against or []))]
    report: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": describe_machine(),
        "versions": _versions(),
    }
    with shown_progress() as step:
        report |= bench(packages, sweep, step)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report, Console(width=None if sys.stdout.isatty() else _WIDTH))


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """Parse "0,512" as (0, 512). Raises ArgumentError."""
    words = _words(text)
    wrong = next((word for word in words if not word.isascii() or not word.isdigit()), None)
    if wrong is not None:
        raise ArgumentError(f"--{name} takes whole numbers with commas between them, not {wrong!r}")
    return tuple(dict.fromkeys(map(int, words)))


def _words(text: str) -> tuple[str, ...]:
    """Parse "off,on" as ("off", "on")."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **installed_versions(_LIBRARIES)}


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report as tables."""
    for found in report["bandwidth"]:
        rate, beside = _middle(found["bytes_s"], 1e9, 1), _beside(found["busy"])
        console.print(f"memory is read at {rate} GB/s with {found['threads']} threads{beside}")
    table = Table("package", "state", "loaded", "peak")
    for found in report["packages"]:
        sizes = (found["state_bytes"], found["loaded_bytes"], found["peak_bytes"])
        table.add_row(found["name"], *("not known" if size is None else decimal(size) for size in sizes))
    console.print(table)
    rows = report["results"]
    swept = [name for name in _SWEPT if len({row[name] for row in rows}) > 1]
    shown = [name for name in _SHOWN if _ONLY_WITH.get(name, "") in ("", *swept)]
    alike = rows[0]["busy"] if rows and "busy" not in swept else 0
    table = Table("package", *swept, *shown, title=f"measured{_beside(alike)}" if alike else None)
    for row in rows:
        table.add_row(row["package"], *(str(row[name]) for name in swept), *(_SHOWN[name](row) for name in shown))
    console.print(table)
    console.print("medians; quartiles and everything else are in the JSON file (--json)", style="dim")


def _beside(busy: int) -> str:
    """Return " beside 1 busy process" for 1, nothing for 0."""
    return f" beside {busy} busy process{'es' * (busy != 1)}" if busy else ""


def _middle(values: dict[str, float] | None, unit: float, digits: int, sign: str = "") -> str:
    """Format the median in a unit; a dash if nothing was measured."""
    return "-" if values is None else f"{values['median'] / unit:.{digits}f}{sign}"


_SWEPT = ("context", "loops", "batch", "chunk", "threads", "busy", "pipeline")
# Columns that are shown only where something is swept.
_ONLY_WITH = {"against quiet": "busy", "runs/token": "pipeline", "against plain": "pipeline"}
# Columns, and what each shows of a row.
_SHOWN: dict[str, Callable[[dict[str, Any]], str]] = {
    "first token": lambda row: _middle(row["first_token_s"], 1, 3, " s"),
    "prefill/s": lambda row: _middle(row["prefill_tokens_s"], 1, 1),
    "decode/s": lambda row: _middle(row["decode_tokens_s"], 1, 2),
    "runs/token": lambda row: _middle(row["runs_per_token"], 1, 2),
    "per loop": lambda row: _middle(row["loop_ms"], 1, 2, " ms"),
    "moves": lambda row: decimal(row["bytes_a_loop"]["total"]),
    "GB/s": lambda row: _middle(row["effective_bytes_s"], 1e9, 2),
    "of bandwidth": lambda row: _middle(row["bandwidth_share"], 0.01, 0, "%"),
    "against first": lambda row: _middle(row["time_against_first"], 1, 3, " x"),
    "against quiet": lambda row: _middle(row["time_against_quiet"], 1, 3, " x"),
    "against plain": lambda row: _middle(row["time_against_plain"], 1, 3, " x"),
    "overhead": lambda row: _middle(row["overhead_share"], 0.01, 1, "%"),
}
