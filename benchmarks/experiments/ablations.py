"""Both ablations, row by row against everything and against the paper: values for docs/experiments.md."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from results import KINDS, Results, each, spread
from runs import EVERYTHING, Row

EQUAL = 1.0  # points; means closer than this count as equal
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

    ``verdict``: "better", "worse" (both on every seed), "same" or "mixed".
    """

    phase: str
    mean: float
    seed_by_seed: str
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
    def as_in_paper(self) -> bool:
        return any(gap.phase == self.paper_phase and gap.verdict == "better" for gap in self.gaps)


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
            gaps.append(Gap(words, statistics.fmean(points), each(points, "{:+.1f}".format), _verdict(points)))
    return gaps


def _verdict(points: list[float]) -> str:
    if abs(statistics.fmean(points)) < EQUAL:
        return "same"
    if min(points) > 0:
        return "better"
    return "worse" if max(points) < 0 else "mixed"
