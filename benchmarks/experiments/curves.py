"""Accuracy against loops, exit thresholds and chunk sizes: values for docs/experiments.md."""

from __future__ import annotations

from dataclasses import dataclass

from results import KINDS, Point, Results
from runs import DEPTHS, EVEN, SEEDS

STUDENTS = {"main": "MELT", **{row.name: row.title for row in (*DEPTHS, EVEN)}}
ALL = {"teacher": "teacher", **STUDENTS, "teacher-even": "the even teacher"}


@dataclass(frozen=True)
class Stopped:
    """A row at an exit threshold: mean loops per token, and percent right on both kinds of problems."""

    title: str
    loops: float
    even: float
    long: float


@dataclass(frozen=True)
class Threshold:
    """All rows at an exit threshold."""

    setting: float
    rows: list[Stopped]


@dataclass(frozen=True)
class Useful:
    """How deep a row must run on problems drawn evenly.

    - ``right``: percent right by loops; ``beyond``: with more loops than were trained.
    - ``full``: all loops. ``cheapest``: the threshold with the fewest loops that costs at most a point.
    """

    title: str
    right: dict[float, float]
    beyond: list[float]
    full: Point
    cheapest: Point


@dataclass(frozen=True)
class Depth:
    """Loops and exit thresholds. ``by_loops``: lines of a table; its columns are ``loops``."""

    loops: list[str]
    by_loops: list[list[str]]
    by_threshold: list[Threshold]
    useful: list[Useful]


@dataclass(frozen=True)
class Chunks:
    """Chunk sizes at prefill.

    - ``by_chunk``: lines of a table; its columns are ``sizes``.
    - ``own_size`` of the model; ``trained_sizes``: those drawn in training.
    - ``prompt``: tokens.
    """

    sizes: list[str]
    by_chunk: list[list[str]]
    own_size: int
    trained_sizes: list[int]
    prompt: int


def depth(results: Results) -> Depth | None:
    """Return what is known about depth. None without a student."""
    students = _measured(results, STUDENTS)
    if not students:
        return None
    shown = _measured(results, ALL)
    return Depth(
        loops=_settings(results, students, "by_loops"),
        by_loops=_lines(results, shown, "by_loops"),
        by_threshold=_thresholds(results, students),
        useful=[_useful(results, name, title) for name, title in students.items()],
    )


def chunks(results: Results) -> Chunks | None:
    """Return what is known about chunk sizes. None without a student."""
    students = _measured(results, STUDENTS)
    if not students:
        return None
    content = results.row(next(iter(students)))[0]["content"]
    return Chunks(
        sizes=_settings(results, students, "by_chunk"),
        by_chunk=_lines(results, students, "by_chunk"),
        own_size=content["melt"]["chunk_size"],
        trained_sizes=content["phase2"]["chunk_sizes"],
        prompt=2 * content["data"]["digits"] + 2,
    )


def _measured(results: Results, titles: dict[str, str]) -> dict[str, str]:
    """Return the titles of the rows that are measured, with the number of seeds where it is not all."""
    seeds = {name: len(results.row(name)) for name in titles}
    few = {name: f" ({count} seed{'s' * (count > 1)} of {len(SEEDS)})" for name, count in seeds.items()}
    return {name: title + few[name] * (seeds[name] < len(SEEDS)) for name, title in titles.items() if seeds[name]}


def _settings(results: Results, students: dict[str, str], curve: str) -> list[str]:
    return [f"{point.setting:g}" for point in results.curve(next(iter(students)), curve, "even")]


def _lines(results: Results, titles: dict[str, str], curve: str) -> list[list[str]]:
    """Return two lines for each row, one for each kind of problem: the title, and percent right for each setting."""
    return [
        [title + suffix, *(f"{point.mean:.1f}" for point in results.curve(name, curve, kind))]
        for name, title in titles.items()
        for kind, suffix in (("even", ""), ("long", ", long carries"))
    ]


def _thresholds(results: Results, students: dict[str, str]) -> list[Threshold]:
    even, long = ({name: results.curve(name, "by_threshold", kind) for name in students} for kind in KINDS)
    return [
        Threshold(
            point.setting,
            [Stopped(students[name], even[name][at].loops, even[name][at].mean, long[name][at].mean) for name in even],
        )
        for at, point in enumerate(even[next(iter(students))])
    ]


def _useful(results: Results, name: str, title: str) -> Useful:
    by_threshold = results.curve(name, "by_threshold", "even")
    right = {point.setting: point.mean for point in results.curve(name, "by_loops", "even")}
    full = by_threshold[-1]
    return Useful(
        title=title,
        right=right,
        beyond=[right[loops] for loops in right if loops > 4],
        full=full,
        cheapest=min((point for point in by_threshold if point.mean >= full.mean - 1), key=lambda point: point.loops),
    )
