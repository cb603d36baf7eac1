"""Tables of evaluations: models side by side, a line for each number of loops."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from .held_out import DepthScore, Evaluation

_WIDTH = 120  # without a terminal
_SIDE_BY_SIDE = 3  # models in a table


def print_evaluations(models: Mapping[str, Evaluation], file: TextIO) -> None:
    """Print loss, perplexity and exact match of every model, all evaluated on the same held-out data."""
    some = next(iter(models.values()))
    counts = {"sequence": some.sequences, "target": some.targets, "problem": some.problems}
    counted = ", ".join(f"{count:,} {name}{'s' * (count != 1)}" for name, count in counts.items() if count)
    console = Console(file=file)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH
    console.print(f"held out: {counted}", highlight=False)
    items = list(models.items())
    for at in range(0, len(items), _SIDE_BY_SIDE):
        console.print(_table(dict(items[at : at + _SIDE_BY_SIDE]), bool(some.problems)))


def _table(models: Mapping[str, Evaluation], exact: bool) -> Table:
    titles = ("loss", "perplexity", "exact") if exact else ("loss", "perplexity")
    heads = {name: name.replace(", ", "\n") for name in models}
    lines = max(head.count("\n") for head in heads.values()) + 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("\n" * lines + "loops", justify="right")
    for head in heads.values():
        for title in titles:
            table.add_column("\n" * (lines - 1 - head.count("\n")) + f"{head}\n{title}", justify="right", no_wrap=True)
    by_loops = {name: {depth.loops: depth for depth in found.depths} for name, found in models.items()}
    for loops in sorted({loops for depths in by_loops.values() for loops in depths}):
        cells = [_cells(depths.get(loops), exact) for depths in by_loops.values()]
        table.add_row(str(loops), *(cell for row in cells for cell in row))
    return table


def _cells(depth: DepthScore | None, exact: bool) -> list[str]:
    if depth is None:
        return ["–"] * (3 if exact else 2)
    return [f"{depth.loss:.4f}", f"{depth.perplexity:,.3f}", *([f"{depth.exact:.1%}"] if exact else [])]


def to_json(models: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return the evaluations as JSON values."""
    return {
        name: {
            "sequences": found.sequences,
            "targets": found.targets,
            "problems": found.problems,
            "depths": [{"loops": depth.loops, **depth.values()} for depth in found.depths],
        }
        for name, found in models.items()
    }
