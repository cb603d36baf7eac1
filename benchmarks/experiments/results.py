"""docs/experiments.json as the documents read it: results by row and seed, means and spreads."""

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
    """What was measured. A run that is missing is in no answer; a row without any run gives empty lists."""

    content: Figures

    @classmethod
    def read(cls, file: Path) -> Results:
        return cls(json.loads(file.read_text(encoding="utf-8")))

    @property
    def runs(self) -> list[Figures]:
        return list(self.content["runs"])

    def row(self, row: str) -> list[Figures]:
        """The runs of a row, by seed."""
        return sorted((run for run in self.runs if run["row"] == row), key=lambda run: run["seed"])

    def run(self, name: str) -> Figures | None:
        return next((run for run in self.runs if run["name"] == name), None)

    def accuracies(self, row: str, stage: str, kind: str) -> dict[int, float]:
        """Seed -> percent right after a stage."""
        return {run["seed"]: percent(run["stages"][stage][kind]) for run in self.row(row)}

    def differences(self, row: str, base: str, stage: str, kind: str) -> dict[int, float]:
        """Seed -> points by which ``base`` is better than ``row``: the same teacher, the same seed."""
        mine, other = (self.accuracies(name, stage, kind) for name in (row, base))
        return {seed: other[seed] - mine[seed] for seed in mine if seed in other}

    def curve(self, row: str, curve: str, kind: str) -> list[Point]:
        """A row's curve (``by_loops``, ``by_threshold``, ``by_chunk``), its points over all seeds."""
        runs = [run[curve] for run in self.row(row) if curve in run]
        setting = {"by_loops": "num_loops", "by_threshold": "exit_threshold", "by_chunk": "chunk_size"}[curve]
        return [
            Point(points[0][setting], [percent(x[kind]) for x in points], statistics.fmean(x["loops"] for x in points))
            for points in zip(*runs, strict=True)
        ]


@dataclass(frozen=True)
class Point:
    """A point of a curve: the setting, every seed's percent right, and the mean loops a token."""

    setting: float
    values: list[float]
    loops: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


def percent(share: float) -> float:
    return round(100 * share, 2)


def spread(values: list[float]) -> str:
    """ "97.3 ± 1.2": mean and sample standard deviation; without a spread if there is one value."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def each(values: list[float], show: Callable[[float], str] = "{:.1f}".format) -> str:
    """ "96.2, 97.0, 98.6"."""
    return ", ".join(map(show, values)) or "–"
