"""Plots of docs/experiments.md, in Okabe and Ito's colours, which every kind of colour vision can tell apart."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib
from results import Results
from runs import AGGREGATIONS, DEPTHS, EVEN, LEFT_OUT
from shared import FAINT, INK, STYLE

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
# Name, colour, marker and dashes by row.
_LINES: dict[str, tuple[str, str, str, Any]] = {
    "teacher": ("teacher", FAINT, "D", (0, (4, 2))),
    "main": ("MELT", _BLUE, "o", "-"),
    "depths": (DEPTHS[0].title, _ORANGE, "s", "-"),
    "depths-last": (DEPTHS[1].title, _GREEN, "^", (0, (1, 1))),
    "even": (EVEN.title, _PURPLE, "v", "-"),
    "teacher-even": ("its teacher", _PURPLE, "D", (0, (4, 2))),
}


def draw_all(results: Results, docs: Path) -> None:
    """Draw every plot for which there is a run, into ``docs``."""
    drawings: dict[str, tuple[Callable[[Any, Results], None], tuple[int, int], tuple[float, float]]] = {
        "ablations": (_ablations, (1, 2), (11, 4.4)),
        "depth": (_depth, (1, 2), (11, 4.2)),
        "chunks": (_chunks, (1, 1), (6.5, 3.8)),
        "losses": (_losses, (1, 3), (12.5, 3.9)),
    }
    for name, (draw, shape, size) in drawings.items():
        path = docs / f"experiments_{name}.png"
        if not results.runs:
            with suppress(FileNotFoundError):
                path.unlink()
            continue
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
            draw(axes[0], results)
            figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": ""})
            plt.close(figure)


def _ablations(panels: Any, results: Results) -> None:
    titles = ("How loops become one row", "A part of the training left out")
    for axes, title, rows in zip(panels, titles, (AGGREGATIONS, LEFT_OUT), strict=True):
        found = [row for row in rows if results.row(row.name)]
        for at, row in enumerate(found):
            for stage, color, marker, shift in (("phase1", _SKY, "o", -0.16), ("phase2", _BLUE, "s", 0.16)):
                values = list(results.accuracies(row.name, stage, "even").values())
                axes.scatter(
                    values, [at + shift] * len(values), s=34, marker=marker, color=color, zorder=3, edgecolor="white"
                )
                mean = statistics.fmean(values)
                axes.plot([mean, mean], [at + shift - 0.14, at + shift + 0.14], color=color, linewidth=3, zorder=2)
        axes.set_yticks(range(len(found)), [row.title.replace(" (everything)", "\n(everything)") for row in found])
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.invert_yaxis()
        axes.set_xlim(-3, 103)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("exactly right, % of problems drawn evenly")
        axes.set_title(title)
    handles = [
        plt.Line2D([], [], color=color, marker=marker, linestyle="", label=label)
        for label, color, marker in (("after phase 1", _SKY, "o"), ("after phase 2", _BLUE, "s"))
    ]
    panels[0].figure.legend(
        handles=[*handles, plt.Line2D([], [], color=FAINT, marker="|", markeredgewidth=3, linestyle="", label="mean")],
        loc="outside lower center",
        ncols=3,
    )


def _depth(panels: Any, results: Results) -> None:
    left, right = panels
    for row, (name, color, marker, dashes) in _LINES.items():
        points = results.curve(row, "by_loops", "even")
        if points:
            x = [point.setting for point in points]
            low, high = ([edge(point.values) for point in points] for edge in (min, max))
            left.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            left.plot(x, [p.mean for p in points], color=color, marker=marker, linestyle=dashes, label=name)
        points = results.curve(row, "by_threshold", "even")
        if points and not row.startswith("teacher"):
            right.plot(
                [p.loops for p in points],
                [p.mean for p in points],
                color=color,
                marker=marker,
                linestyle=dashes,
                label=name,
            )
    left.set_xlabel("loops given to every token (trained: 4)")
    right.set_xlabel("mean loops a written token, as the exit threshold goes from 0.5 to 1")
    left.set_title("The same number of loops for every token")
    right.set_title("Each token leaves when its exit gate says so")
    right.set_xlim(0.9, 4.1)
    for axes in panels:
        axes.set_ylim(-3, 103)
        axes.set_ylabel("exactly right, %")
    panels[0].figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _chunks(panels: Any, results: Results) -> None:
    (axes,) = panels
    sizes: list[float] = []
    for row, (name, color, marker, dashes) in _LINES.items():
        points = results.curve(row, "by_chunk", "even")
        if points:
            sizes = [point.setting for point in points]
            axes.plot(
                range(len(sizes)), [p.mean for p in points], color=color, marker=marker, linestyle=dashes, label=name
            )
    axes.set_xticks(range(len(sizes)), [f"{size:g}" for size in sizes])
    axes.set_xlabel("tokens a chunk in which the prompt of 16 tokens is read")
    axes.set_ylabel("exactly right, %")
    axes.set_ylim(-3, 103)
    if sizes:
        axes.figure.legend(loc="outside lower center", ncols=3)


def _losses(panels: Any, results: Results) -> None:
    teacher, main = results.run("teacher-0"), results.run("main-0")
    first, second, third = panels
    if teacher is not None:
        points = teacher["stages"]["teacher"]["losses"]
        loops = sorted(name for name in points[0] if name.startswith("loss_"))
        for name, color in zip(loops, (_ORANGE, _PURPLE, _SKY, _BLUE), strict=False):
            _line(first, points, name, f"loop {name.removeprefix('loss_')}", color)
    if main is not None:
        points = main["stages"]["phase1"]["losses"]
        _line(second, points, "kl", "mean of all loops", _ORANGE)
        _line(second, points, "kl_last", "last loop", _BLUE)
        above = second.twinx()
        above.plot([p["step"] for p in points], [p["alpha"] for p in points], color=FAINT, linestyle=(0, (1, 1)))
        above.set_ylim(0, 1.02)
        above.set_ylabel("alpha (dotted)", color=FAINT)
        above.grid(visible=False)
        points = main["stages"]["phase2"]["losses"]
        _line(third, points, "kl", "divergence, all loops", _ORANGE)
        _line(third, points, "kl_last", "divergence, last loop", _BLUE)
        _line(third, points, "attention", "attention alignment", _GREEN)
    titles = ("Teacher: cross-entropy, nats per token", "Phase 1: divergence, nats per token", "Phase 2")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_title(title)
        if axes.lines:
            axes.legend(fontsize=8.5)


def _line(axes: Any, points: list[dict[str, Any]], name: str, label: str, color: str) -> None:
    """Draw a curve on a logarithmic axis, leaving out values of 0."""
    kept = [(p["step"], p[name]) for p in points if p[name] > 0]
    axes.plot(*zip(*kept, strict=True), label=label, color=color, linewidth=1.6)
