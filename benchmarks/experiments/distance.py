"""The section of docs/experiments.md on MELT's distance from its teacher: each budget, seed by seed."""

from __future__ import annotations

import statistics
from typing import Any

from results import KINDS, Results, each, percent, spread
from runs import BUDGETS, EVEN, LONG_STEPS, TEACHER, TUNED, Row
from sections import PAPER, Section, few, section
from shared import table

PAPER_DISTANCE = 2.4  # points of the paper's MELT below its teacher: 62.3 - 59.9, mean over six sets
Accuracies = dict[str, dict[int, float]]


def teacher_part(results: Results) -> Section:
    """Write the section on teachers and the students distilled from them."""
    teachers, budgets = results.row("teacher"), [row for row in BUDGETS if results.row(row.name)]
    if not teachers or not budgets:
        return section("A teacher and its MELT", "Not measured yet.\n")
    deep = teachers[0]["content"]["model"]["total_ut_steps"]
    shallow = _at_loop(teachers, 1)
    solving = _at_loop(teachers, deep)
    rows = [
        _row("teacher stopped at loop 1", shallow, teachers),
        _row(f"teacher, {deep} loops", solving, teachers, minutes(teachers)),
    ]
    sentences = []
    for row in budgets:
        rows += _student_rows(results, row, solving)
        sentences.append(_distance(row, _gaps(results, row, solving)))
    even_teachers = results.row("teacher-even")
    if even_teachers and results.row(EVEN.name):
        even = _at_loop(even_teachers, deep)
        rows.append(_row("the even teacher" + few(results, EVEN), even, even_teachers, minutes(even_teachers)))
        rows += _student_rows(results, EVEN, even)
        sentences.append(_distance(EVEN, _gaps(results, EVEN, even)))
    solved = min(solving["even"].values()) >= 95 and max(shallow["even"].values()) < 50
    smaller = teachers[0]["cache_bytes_a_token"] / results.row(budgets[0].name)[0]["cache_bytes_a_token"]
    return section(
        "A teacher and its MELT",
        table(
            ["", *(f"{words}, % right" for words in KINDS.values()), "cache per token, bytes", "weights", "minutes"],
            rows,
        ),
        "Every seed's value is in brackets. Minutes: mean wall time of training a run, on a core that may have been "
        "shared.\n",
        f"The teacher {'solves' if solved else 'DOES NOT solve'} the task by looping: at least "
        f"{min(solving['even'].values()):.1f}% right with {deep} loops and at most "
        f"{max(shallow['even'].values()):.1f}% at loop 1 on problems drawn evenly (wanted: at least 95, below 50). "
        f"MELT has 1/{smaller:.0f} of its cache. The paper's MELT-1.6B is {PAPER_DISTANCE} points below its teacher "
        f"({PAPER}, mean of six sets of maths problems).\n",
        "".join(f"- {sentence}\n" for sentence in sentences),
        f"*{TUNED.title}* takes {LONG_STEPS[1]} steps in phase 2 and follows the ablations below: attention alignment "
        f"weighs {TUNED.phase2['attention_weight']:g} instead of 0.1, alpha is 1 after "
        f"{TUNED.phase1['interpolation_share']:.0%} of phase 1, matrices are trained with Muon. *{EVEN.title}* is the "
        f"checkpoint that the demo ships; its teacher's entropy weight is {EVEN.teacher['entropy_weight']:g} instead "
        f"of {TEACHER['entropy_weight']:g} (see the section on depth).\n",
        note="teacher",
    )


def minutes(runs: list[dict[str, Any]]) -> str:
    """Return the mean minutes of training."""
    return f"{statistics.fmean(sum(s['seconds'] for s in run['stages'].values()) for run in runs) / 60:.0f}"


def _at_loop(runs: list[dict[str, Any]], loops: int) -> Accuracies:
    """Return percent right with a number of loops, by kind of problem, then by seed."""

    def right(run: dict[str, Any], kind: str) -> float:
        return next(percent(point[kind]) for point in run["by_loops"] if point["num_loops"] == loops)

    return {kind: {run["seed"]: right(run, kind) for run in runs} for kind in KINDS}


def _student_rows(results: Results, row: Row, teacher: Accuracies) -> list[list[str]]:
    runs = results.row(row.name)
    right = {kind: results.accuracies(row.name, "phase2", kind) for kind in KINDS}
    gaps = _gaps(results, row, teacher)
    return [
        _row(row.title + few(results, row), right, runs, minutes(runs)),
        ["points below its teacher", *(f"{spread(x)} ({each(x)})" for x in gaps.values()), "", "", ""],
    ]


def _gaps(results: Results, row: Row, teacher: Accuracies) -> dict[str, list[float]]:
    """Return the points by which each seed's teacher is better, by kind of problem."""
    return {
        kind: [
            teacher[kind][seed] - value
            for seed, value in results.accuracies(row.name, "phase2", kind).items()
            if seed in teacher[kind]
        ]
        for kind in KINDS
    }


def _row(name: str, values: Accuracies, runs: list[dict[str, Any]], minutes: str = "") -> list[str]:
    cells = [f"{spread(list(x.values()))} ({each(list(x.values()))})" for x in values.values()]
    return [name, *cells, f"{runs[0]['cache_bytes_a_token']:,}", f"{runs[0]['parameters']:,}", minutes]


def _distance(row: Row, gaps: dict[str, list[float]]) -> str:
    """Say how far a MELT is from its teacher, on average and at worst."""
    means = {kind: statistics.fmean(values) for kind, values in gaps.items()}
    worst = max(max(values) for values in gaps.values())
    parts = [f"{means[kind]:.1f} ({words})" for kind, words in KINDS.items()]

    def judged(distance: float) -> str:
        return f"{'within' if round(distance, 1) <= PAPER_DISTANCE else 'MORE than'} the {PAPER_DISTANCE} points"

    return (
        f"**{row.title}** is on average {' and '.join(parts)} points below, {judged(max(means.values()))}; "
        f"at worst, on one seed and kind of problem, {worst:.1f}, {judged(worst)}."
    )
