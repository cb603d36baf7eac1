"""Results in docs/experiments.json, by row and seed, with means and spreads."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
KINDS = {"even": "drawn evenly", "long": "long carries"}


@dataclass(frozen=True)
class Results:
    """All measured runs. A run that is missing is left out; a row without runs gives empty lists."""

    content: Figures

    @classmethod
    def read(cls, file: Path) -> Results:
        return cls(json.loads(file.read_text(encoding="utf-8")))

    @property
    def runs(self) -> list[Figures]:
        return list(self.content["runs"])

    def row(self, row: str) -> list[Figures]:
        """Return the runs of a row, by seed."""
        return sorted((run for run in self.runs if run["row"] == row), key=lambda run: run["seed"])

    def run(self, name: str) -> Figures | None:
        return next((run for run in self.runs if run["name"] == name), None)

    def accuracies(self, row: str, stage: str, kind: str) -> dict[int, float]:
        """Return percent right after a stage, by seed."""
        return {run["seed"]: percent(run["stages"][stage][kind]) for run in self.row(row)}

    def differences(self, row: str, base: str, stage: str, kind: str) -> dict[int, float]:
        """Return the points by which ``base`` is better than ``row``, by seed. Both have the same teacher and seed."""
        mine, other = (self.accuracies(name, stage, kind) for name in (row, base))
        return {seed: other[seed] - mine[seed] for seed in mine if seed in other}

    def curve(self, row: str, curve: str, kind: str) -> list[Point]:
        """Return the points of a row's curve (``by_loops``, ``by_threshold`` or ``by_chunk``), over all seeds."""
        runs = [run[curve] for run in self.row(row) if curve in run]
        setting = {"by_loops": "num_loops", "by_threshold": "exit_threshold", "by_chunk": "chunk_size"}[curve]
        return [
            Point(points[0][setting], [percent(x[kind]) for x in points], statistics.fmean(x["loops"] for x in points))
            for points in zip(*runs, strict=True)
        ]


@dataclass(frozen=True)
class Point:
    """A point of a curve: the setting, every seed's percent right, and the mean loops per token."""

    setting: float
    values: list[float]
    loops: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


def percent(share: float) -> float:
    return round(100 * share, 2)


def spread(values: list[float]) -> str:
    """Format mean and sample standard deviation, "97.3 ± 1.2"; of a single value the value alone."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def each(values: list[float], show: Callable[[float], str] = "{:.1f}".format) -> str:
    """Format all values: "96.2, 97.0, 98.6"."""
    return ", ".join(map(show, values)) or "–"
