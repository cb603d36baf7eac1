"""Both ablations, row by row against everything and against the paper: values for docs/experiments.md."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from results import KINDS, Results, each, spread
from runs import EVERYTHING, Row

EQUAL = 1.0  # points; differences smaller than this on every seed count as none
# 97.5% quantiles of Student's t by degrees of freedom: half the width of a 95% interval, in standard errors.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
# The paper's figures for the rows of both tables.
PAPER_AGGREGATIONS = {"gate": "77.7", "scalar-gate": "66.9", "mean": "68.8", "ema-0.2": "68.6", "last": "69.7"}
PAPER_LEFT_OUT = {
    "no-chunk-wise": "0.0 on every set",
    "no-interpolation": "about -10 points",
    "no-alignment": "-2 to -3 points",
}
PHASES = {"phase1": "after phase 1", "phase2": "after phase 2"}


@dataclass(frozen=True)
class AblationRow:
    """A row of both tables of an ablation: a cell for each phase and kind of problem, and the paper's figure."""

    title: str
    seeds: int
    means: list[str]
    seed_by_seed: list[str]
    paper: str


@dataclass(frozen=True)
class Gap:
    """The points by which everything is better than a row after a phase, on problems drawn evenly.

    - ``interval``: the 95% confidence interval of the mean; None from one seed.
    - ``verdict``: "better" or "worse" if the interval excludes 0, "leans better" or "leans worse" if it does not but
      all seeds agree, else "mixed"; "same" if no seed differs by EQUAL.
    """

    phase: str
    mean: float
    seed_by_seed: str
    interval: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """A row against everything.

    - ``gaps``: one for each phase; none if no seed has both.
    - ``paper_phase``: the phase to compare with the paper, in which everything is better. None if the paper lacks the
      row.
    """

    title: str
    gaps: list[Gap]
    paper_phase: str | None

    @property
    def in_paper_phase(self) -> str | None:
        """The verdict of the phase to compare with the paper."""
        return next((gap.verdict for gap in self.gaps if gap.phase == self.paper_phase), None)


@dataclass(frozen=True)
class Ablation:
    """The measured rows of an ablation, and how all but everything itself compare with everything."""

    rows: list[AblationRow]
    comparisons: list[Comparison]


def ablation(results: Results, rows: tuple[Row, ...], paper: dict[str, str], paper_phase: str) -> Ablation | None:
    """Compare the measured rows. None if there is none.

    ``paper``: its figures by row. ``paper_phase``: the phase to compare with these figures.
    """
    found = [row for row in rows if results.row(row.name)]
    if not found:
        return None
    return Ablation(
        rows=[_row(results, row, paper.get(row.name, "–")) for row in found],
        comparisons=[
            Comparison(row.title, _gaps(results, row), PHASES[paper_phase] if row.name in paper else None)
            for row in found
            if row is not EVERYTHING
        ],
    )


def _row(results: Results, row: Row, paper: str) -> AblationRow:
    cells = [list(results.accuracies(row.name, phase, kind).values()) for phase in PHASES for kind in KINDS]
    return AblationRow(row.title, len(results.row(row.name)), [*map(spread, cells)], [*map(each, cells)], paper)


def _gaps(results: Results, row: Row) -> list[Gap]:
    gaps = []
    for phase, words in PHASES.items():
        points = list(results.differences(row.name, EVERYTHING.name, phase, "even").values())
        if points:
            interval = confidence_interval(points)
            verdict = _verdict(points, interval)
            gaps.append(Gap(words, statistics.fmean(points), each(points, "{:+.1f}".format), interval, verdict))
    return gaps


def confidence_interval(points: list[float]) -> tuple[float, float] | None:
    """Return the 95% confidence interval of the mean, by Student's t; None for fewer than two points."""
    if len(points) < 2:
        return None
    mean, error = statistics.fmean(points), statistics.stdev(points) / math.sqrt(len(points))
    half = STUDENT_T[min(len(points) - 1, max(STUDENT_T))] * error
    return mean - half, mean + half


def _verdict(points: list[float], interval: tuple[float, float] | None) -> str:
    if max(map(abs, points)) < EQUAL:
        return "same"
    if min(points) <= 0 <= max(points):
        return "mixed"
    word = "better" if min(points) > 0 else "worse"
    shown = interval is not None and (interval[0] > 0 or interval[1] < 0)
    return word if shown else f"leans {word}"
