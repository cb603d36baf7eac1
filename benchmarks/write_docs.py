"""Writes docs/benchmarks.md and docs/loop_step.png from docs/benchmarks.json; neither is edited by hand. The text is
benchmarks/templates/benchmarks.md.j2.

    python benchmarks/write_docs.py

Needs matplotlib: pip install 'melt-export[bench]'. The JSON file has the section "loop_step" (loop_step.py) and, if
they were measured, "export" (one export of a real-size checkpoint), "engines" (engine_build.py), "batching"
(batching.py), "comparison" (compare.py), "commit" (compare_commit.py), "pipelined" (pipelined.py), "quantization"
(quantization.py) and "training_memory" (training_memory.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import compare_docs
import compare_plots
import numpy as np
import pipelined_docs
import typer
from common import DOCS, FAINT, STYLE, plural
from templating import render

_COLORS = ("#d1700f", "#7a3e9d", "#0b6bcb")
_MARKERS = ("o", "s", "D")

Row = dict[str, Any]


def slope(rows: list[Row]) -> float:
    """Return the microseconds that 1,000 more tokens in the cache add to a step, fitted to the rows' medians."""
    return 1000 * float(np.polyfit([row["tokens"] for row in rows], [row["median_us"] for row in rows], 1)[0])


def markdown(content: Row) -> str:
    """Write docs/benchmarks.md."""
    report = content["loop_step"]
    buffer = max(row["rows"] for row in report["time"])
    largest = [row for row in report["time"] if row["rows"] == buffer]
    settled = next(sample for sample in report["long"] if sample["tokens"] > 1)
    return render(
        "benchmarks.md.j2",
        content=content,
        section=report,
        comparison=compare_docs.part(content["comparison"]) if "comparison" in content else "",
        pipelined=pipelined_docs.part(content["pipelined"]) if "pipelined" in content else "",
        largest=largest,
        slope_us=slope(largest),
        settled=settled,
        grown_bytes=report["long"][-1]["resident_bytes"] - settled["resident_bytes"],
    )


def plot(report: Row, path: Path) -> None:
    """Draw docs/loop_step.png: two panels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {**STYLE, "font.size": 10.5, "axes.titlesize": 11.5, "axes.titlepad": 26}
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1.45, 1), layout="constrained")
        figure.get_layout_engine().set(wspace=0.07, w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
        _time_panel(left, report)
        _memory_panel(right, report)
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": ""})
        plt.close(figure)


def _subtitle(axes: Any, text: str) -> None:
    axes.text(0, 1.035, text, transform=axes.transAxes, color=FAINT, fontsize=9.5, va="bottom")


def _highest(report: Row, tokens: int) -> float:
    """Return the largest upper quartile at a number of tokens, in microseconds."""
    return max(row["quartiles_us"][1] for row in report["time"] if row["tokens"] == tokens)


def _time_panel(axes: Any, report: Row) -> None:
    from matplotlib.transforms import ScaledTranslation

    settings = report["settings"]
    sizes = sorted({row["rows"] for row in report["time"]})
    top = max(row["quartiles_us"][1] for row in report["time"]) / 1000
    axes_end = max(row["tokens"] for row in report["time"])
    for index, size in enumerate(sizes):
        rows = [row for row in report["time"] if row["rows"] == size]
        x = np.array([row["tokens"] for row in rows])
        y = np.array([row["median_us"] for row in rows]) / 1000
        spread = np.abs(np.array([row["quartiles_us"] for row in rows]).T / 1000 - y)
        color, last = _COLORS[index % 3], index == len(sizes) - 1
        # The lines would coincide, so they are drawn a few points apart, with the largest buffer named below.
        beside = ScaledTranslation((index - (len(sizes) - 1) / 2) * 5 / 72, 0, axes.figure.dpi_scale_trans)
        axes.errorbar(
            x,
            y,
            yerr=spread,
            color=color,
            linewidth=2,
            linestyle="-" if last else (0, (4, 2)),
            marker=_MARKERS[index % 3],
            markersize=6,
            markerfacecolor=color if last else "white",
            markeredgewidth=1.6,
            elinewidth=1.2,
            capsize=2.5,
            zorder=3 + index,
            transform=axes.transData + beside,
        )
        at_end = x[-1] == axes_end
        axes.annotate(
            f"buffer for {size:,} tokens",
            (x[-1], y[-1] if at_end else _highest(report, x[-1]) / 1000),
            xytext=(-12, -26 if last else 26) if at_end else (0, 14),
            textcoords="offset points",
            ha="right" if at_end else "center",
            va="center",
            color=color,
            fontweight="bold",
        )
    axes.set_ylim(0, top * 1.22)
    axes.set_xlim(0, axes_end * 1.04)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("one loop step at decode, ms")
    axes.set_title("Time follows the tokens, not the buffer")
    shape = "Ouro-1.4B" if settings["shape"] == "ouro-1.4b" else settings["shape"]
    _subtitle(
        axes,
        f"{plural(settings['layers'], 'layer')} of the {shape} shape, {settings['precision']}, "
        f"{plural(settings['threads'], 'CPU thread')}; median and quartiles",
    )


def _memory_panel(axes: Any, report: Row) -> None:
    loops = [row["loops"] for row in report["loops"]]
    cache = report["loops"][0]["cache_bytes_a_loop"] / 1e9
    lines = {
        "caches of a LoopLM\n(computed)": ([loop * cache for loop in loops], _COLORS[0], (0, (4, 2))),
        "MELT, whole process\nat its peak": ([row["peak_bytes"] / 1e9 for row in report["loops"]], FAINT, "-"),
        "MELT, all state": ([row["state_bytes"] / 1e9 for row in report["loops"]], _COLORS[2], "-"),
    }
    for name, (y, color, dashes) in lines.items():
        computed = "computed" in name
        below = computed or "\n" in name
        axes.plot(loops, y, color=color, linewidth=2.2, linestyle=dashes, marker=None if computed else "o", zorder=3)
        axes.annotate(
            name,
            (loops[-1], y[-1]),
            xytext=(-34 if computed else 4, 0 if computed else (-9 if below else 9)),
            textcoords="offset points",
            ha="right",
            va="top" if below else "bottom",
            color=color,
            fontweight="bold",
            linespacing=1.3,
        )
    axes.set_xlim(0, max(loops) * 1.04)
    axes.set_ylim(0, None)
    axes.set_xticks(loops)
    axes.set_xlabel("loops per token")
    axes.set_ylabel("memory, GB")
    axes.set_title("More loops, the same memory")
    _subtitle(axes, f"the same slice, one sequence, {report['settings']['memory_rows']:,} tokens")


def main(
    directory: Annotated[
        Path, typer.Option("--docs", help="Directory of benchmarks.json; the results go there.")
    ] = DOCS,
) -> None:
    """Write benchmarks.md and loop_step.png from benchmarks.json (needs matplotlib)."""
    content = json.loads((directory / "benchmarks.json").read_text(encoding="utf-8"))
    plot(content["loop_step"], directory / "loop_step.png")
    if "comparison" in content:
        compare_plots.plots(content["comparison"], directory)
    if "pipelined" in content:
        pipelined_docs.plot(content["pipelined"], directory / "pipelined.png")
    (directory / "benchmarks.md").write_text(markdown(content), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
