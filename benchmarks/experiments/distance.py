"""MELT's distance from its teacher, seed by seed: values for docs/experiments.md."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from results import KINDS, Results, each, percent, spread
from runs import BUDGETS, EVEN, Row

PAPER_DISTANCE = 2.4  # points of the paper's MELT below its teacher: 62.3 - 59.9, mean over six sets
Accuracies = dict[str, dict[int, float]]  # percent right by kind of problem, then by seed


@dataclass(frozen=True)
class Model:
    """A model of all its seeds.

    - ``right``: percent right for each kind of problem, as text.
    - ``minutes``: mean time of training.
    """

    right: list[str]
    cache_bytes: int
    parameters: int
    minutes: str


@dataclass(frozen=True)
class Student:
    """A MELT, and the points by which its teacher is better.

    - ``own_teacher``: the teacher, if no other student has it.
    - ``gaps``: all seeds' points for each kind of problem, as text; ``mean_gaps``: their mean by kind.
    """

    title: str
    seeds: int
    model: Model
    own_teacher: Model | None
    gaps: list[str]
    mean_gaps: dict[str, float]
    worst_gap: float


@dataclass(frozen=True)
class Distance:
    """Teachers and the students distilled from them. ``stopped`` is the teacher at loop 1."""

    loops: int
    stopped: Model
    teacher: Model
    students: list[Student]
    worst_at_all_loops: float
    best_at_one_loop: float
    cache_ratio: float

    @property
    def solved(self) -> bool:
        """Whether the teacher solves the task, and needs its loops to do it."""
        return self.worst_at_all_loops >= 95 and self.best_at_one_loop < 50


def distance(results: Results) -> Distance | None:
    """Compare the students with their teachers. None without a teacher or without a student."""
    teachers, budgets = results.row("teacher"), [row for row in BUDGETS if results.row(row.name)]
    if not teachers or not budgets:
        return None
    loops = teachers[0]["content"]["model"]["total_ut_steps"]
    stopped, solving = _at_loop(teachers, 1), _at_loop(teachers, loops)
    students = [_student(results, row, solving) for row in budgets]
    even_teachers = results.row("teacher-even")
    if even_teachers and results.row(EVEN.name):
        even = _at_loop(even_teachers, loops)
        students.append(_student(results, EVEN, even, _model(even, even_teachers)))
    return Distance(
        loops=loops,
        stopped=_model(stopped, teachers),
        teacher=_model(solving, teachers),
        students=students,
        worst_at_all_loops=min(solving["even"].values()),
        best_at_one_loop=max(stopped["even"].values()),
        cache_ratio=teachers[0]["cache_bytes_a_token"] / results.row(budgets[0].name)[0]["cache_bytes_a_token"],
    )


def _at_loop(runs: list[dict[str, Any]], loops: int) -> Accuracies:
    def right(run: dict[str, Any], kind: str) -> float:
        return next(percent(point[kind]) for point in run["by_loops"] if point["num_loops"] == loops)

    return {kind: {run["seed"]: right(run, kind) for run in runs} for kind in KINDS}


def _model(right: Accuracies, runs: list[dict[str, Any]]) -> Model:
    seconds = statistics.fmean(sum(stage["seconds"] for stage in run["stages"].values()) for run in runs)
    return Model(
        right=[_spread_and_seeds(list(values.values())) for values in right.values()],
        cache_bytes=runs[0]["cache_bytes_a_token"],
        parameters=runs[0]["parameters"],
        minutes=f"{seconds / 60:.0f}",
    )


def _student(results: Results, row: Row, teacher: Accuracies, own_teacher: Model | None = None) -> Student:
    runs = results.row(row.name)
    right = {kind: results.accuracies(row.name, "phase2", kind) for kind in KINDS}
    gaps = {
        kind: [teacher[kind][seed] - value for seed, value in values.items() if seed in teacher[kind]]
        for kind, values in right.items()
    }
    return Student(
        title=row.title,
        seeds=len(runs),
        model=_model(right, runs),
        own_teacher=own_teacher,
        gaps=[_spread_and_seeds(values) for values in gaps.values()],
        mean_gaps={kind: statistics.fmean(values) for kind, values in gaps.items()},
        worst_gap=max(max(values) for values in gaps.values()),
    )


def _spread_and_seeds(values: list[float]) -> str:
    return f"{spread(values)} ({each(values)})"
