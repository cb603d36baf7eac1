"""Whether early exit lies above the line of fixed depths and their mixtures: some tokens k loops, others k + 1."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LEAST_LOOPS = 0.01  # smaller differences, on any seed, are none
LEAST_QUALITY = 0.001  # 0.1 points, or 0.1% of a perplexity
Points = list[tuple[float, float]]  # (cost in loops per token, quality), by cost


def upper_line(points: Sequence[tuple[float, float]]) -> Points:
    """Return the corners of the best line through points and their mixtures: what costs more is better, and each
    further loop gains less."""
    hull: Points = []
    for cost, quality in sorted(points):
        if hull and quality <= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], (cost, quality)):
            hull.pop()
        hull.append((cost, quality))
    return hull


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else float("inf")


def quality_at(line: Points, cost: float) -> float | None:
    """Return the quality of a line at a cost; None below its cheapest point."""
    if cost < line[0][0]:
        return None
    for (c0, q0), (c1, q1) in pairwise(line):
        if cost <= c1:
            return q0 + (q1 - q0) * (cost - c0) / (c1 - c0)
    return line[-1][1]


def cost_of(line: Points, quality: float) -> float | None:
    """Return the least cost at which a line reaches a quality; None above its best point."""
    if quality <= line[0][1]:
        return line[0][0]
    for (c0, q0), (c1, q1) in pairwise(line):
        if quality <= q1:
            return c0 + (c1 - c0) * (quality - q0) / (q1 - q0)
    return None


@dataclass(frozen=True)
class Gain:
    """What a criterion gains on the line of fixed depths at one depth, or mixture of depths, seed by seed.

    ``loops``: saved at the quality that this depth has; None for a seed whose criterion does not reach it.
    ``quality``: better at the same cost.
    """

    depth: float
    loops: list[float | None]
    quality: list[float]

    @property
    def above(self) -> bool:
        """Whether the criterion saves loops on every seed, by more than the standard deviation over seeds, or is better
        at equal cost in that way."""
        reached = [one for one in self.loops if one is not None]
        return (len(reached) == len(self.loops) and clear(reached, LEAST_LOOPS)) or clear(self.quality, LEAST_QUALITY)


def clear(values: list[float], least: float) -> bool:
    """Whether values, by seed, are all above ``least``, and their mean is above their standard deviation."""
    if len(values) < 2 or min(values) <= least:
        return False
    return statistics.fmean(values) > statistics.stdev(values)


def compared_depths(seeds: Sequence[dict[str, Any]]) -> list[float]:
    """Return the depths at which criteria are compared: from 2 loops on, and where no seed gains from a third, mixtures
    of 1 and 2 too, between which all of the choice then lies."""
    flat = all(upper_line(_pairs(seed["fixed"]))[-1][0] <= 2 for seed in seeds)
    return [*((1.25, 1.5, 1.75) if flat else ()), *range(2, seeds[0]["loops"] + 1)]


def gains(seeds: Sequence[dict[str, Any]], criterion: str) -> list[Gain]:
    """Compare a criterion with fixed depths. ``seeds``: the curves of exits.py."""
    found = []
    for depth in compared_depths(seeds):
        saved: list[float | None] = []
        better: list[float] = []
        for seed in seeds:
            fixed, early = (upper_line(_pairs(points)) for points in (seed["fixed"], seed["criteria"][criterion]))
            settled = [point["quality"] for point in seed["fixed"] if point["setting"] == depth]
            aim = settled[0] if settled else quality_at(fixed, depth)
            assert aim is not None
            paid, cost = cost_of(fixed, aim), cost_of(early, aim)
            saved.append(None if cost is None or paid is None else paid - cost)
            mine, theirs = quality_at(early, depth), quality_at(fixed, depth)
            better.append(float("-inf") if mine is None or theirs is None else mine - theirs)
        found.append(Gain(depth, saved, better))
    return found


def _pairs(points: Sequence[dict[str, Any]]) -> Points:
    return [(point["cost"], point["quality"]) for point in points]
