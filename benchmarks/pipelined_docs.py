"""Values of the template pipelined.md.j2, and docs/pipelined.png, from the section "pipelined", which pipelined.py
writes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from common import FAINT, STYLE
from templating import render

Row = dict[str, Any]
_PLAIN, _PIPED, _PUBLISHED = "#6e7781", "#0b6bcb", "#d1700f"
# Sections of trained models: their names, and what they are.
_MODELS = {
    "trained": ("LoopLM", "A LoopLM, whose tokens pipelined decoding must not change"),
    "melt": (
        "MELT",
        "The MELT of examples/addition-melt, whose loops share a cache, so that staggered tokens may differ",
    ),
}


def part(report: Row) -> str:
    """Write what was measured."""
    return render(
        "pipelined.md.j2",
        section=report,
        identity=_identity(report["identity"]["results"]) if "identity" in report else None,
        trained={
            key: {"name": name, "what": what, "opinions": _opinions(report[key].get("opinions", {}))}
            for key, (name, what) in _MODELS.items()
            if key in report
        },
    )


def _identity(results: list[Row]) -> Row:
    """Sum up by kind of package; runs per token by number of loops."""
    loops = sorted({row["loops"] for row in results})
    kinds = []
    for kind in dict.fromkeys(row["kind"] for row in results):
        rows = [row for row in results if row["kind"] == kind]
        runs = [f"{np.mean([row['runs_per_token'] for row in rows if row['loops'] == depth]):.2f}" for depth in loops]
        kinds.append({"kind": kind, **_sum(rows), "runs": runs})
    shapes = list(dict.fromkeys(row["shape"] for row in results))
    return {"loops": loops, "kinds": kinds, "all": _sum(results), "shapes": shapes}


def _sum(rows: list[Row]) -> Row:
    return {
        "tokens": sum(row["tokens"] for row in rows),
        "differing": sum(len(row["differences"]) for row in rows),
        "ties": sum(row["ties"] for row in rows),
        "noise": max(row["noise"] for row in rows),
    }


def _opinions(counts: Row) -> str:
    """Say how often each loop already predicted the final token, if that was counted."""
    if not counts:
        return ""
    total = sum(counts.values())
    shares = [
        f"loop {loop + 1} in {sum(count for said, count in counts.items() if said[loop] == '1') / total:.0%}"
        for loop in range(len(next(iter(counts))))
    ]
    return f"The final token was already predicted by {', '.join(shares)} of {total:,} tokens that could be drafted."


def plot(report: Row, path: Path) -> None:
    """Draw runs per token against loops and, if it was measured, tokens/s."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    speed = report.get("speed")
    with plt.rc_context(STYLE):
        ratios = (1, 1.4) if speed else (1,)
        size, columns = (12 if speed else 6, 4.4), len(ratios)
        figure, axes = plt.subplots(1, columns, figsize=size, width_ratios=ratios, layout="constrained", squeeze=False)
        _runs_panel(axes[0][0], report)
        if speed:
            _speed_panel(axes[0][1], speed)
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": ""})
        plt.close(figure)


def _runs_panel(axes: Any, report: Row) -> None:
    lines: dict[str, tuple[dict[int, float], str, Any]] = {}
    if "identity" in report:
        by_loops = defaultdict(list)
        for row in report["identity"]["results"]:
            by_loops[row["loops"]].append(row["runs_per_token"])
        lines["random models"] = (
            {loops: float(np.mean(runs)) for loops, runs in by_loops.items()},
            _PIPED,
            (0, (4, 2)),
        )
    for key, (name, _) in _MODELS.items():
        greedy = [
            row
            for row in report.get(key, {"results": []})["results"]
            if (row["problems"], row["temperature"]) == ("hard", 0)
        ]
        for mode, color in (("every loop", _PIPED), ("loop 1 alone", _PUBLISHED)):
            found = {row["loops"]: row["modes"][mode]["runs_per_token"] for row in greedy if mode in row["modes"]}
            if found:
                lines[f"{name}, drafts from {mode}"] = (found, color, "-" if key == "trained" else ":")
    most = max((max(found) for found, _, _ in lines.values()), default=4)
    axes.plot((1, most), (1, most), color=_PLAIN, label="plain decoding")
    for label, (found, color, dashes) in lines.items():
        depths = sorted(found)
        axes.plot(depths, [found[loops] for loops in depths], marker="o", color=color, linestyle=dashes, label=label)
    axes.legend(loc="upper left", frameon=False)
    axes.set(xlabel="loops per token", ylabel="runs of the loop step per token", xticks=range(1, most + 1))
    axes.set_ylim(0, most + 0.3)
    axes.set_title("Runs per token")


def _speed_panel(axes: Any, section: Row) -> None:
    rows, width = section["results"], 0.38
    places = np.arange(len(rows))
    for offset, name, color, label in (
        (-width / 2, "plain_tokens_s", _PLAIN, "plain"),
        (width / 2, "pipelined_tokens_s", _PIPED, "pipelined"),
    ):
        y = np.array([row[name]["median"] for row in rows])
        spread = np.abs([[row[name][side] for row in rows] for side in ("low", "high")] - y)
        axes.bar(places + offset, y, width, yerr=spread, color=color, label=label, capsize=2.5, ecolor=FAINT)
    for place, row in zip(places, rows, strict=True):
        top = max(row[name]["high"] for name in ("plain_tokens_s", "pipelined_tokens_s"))
        text = f"{row['times_as_fast']['median']:.2f}x"
        axes.annotate(text, (place, top), xytext=(0, 4), textcoords="offset points", ha="center", color=_PIPED)
    labels = [f"{row['context']}\n{row['threads']}\n{row['busy']}\n{row.get('cache', 'fp32')}" for row in rows]
    axes.set_xticks(places, labels)
    axes.set_xlabel("tokens in the cache, threads, busy processes beside, type of the cache")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.legend(loc="upper left", frameon=False, ncols=2)
    axes.grid(axis="x", visible=False)
    settings = section["settings"]
    axes.set_title(f"Tokens per second, 1.4B shape ({settings['layers']} layers), int4, {settings['loops']} loops")
