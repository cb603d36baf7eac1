"""Writes docs/adaptive-depth.md and its plots from docs/exits.json; none of them is edited by hand.

python benchmarks/experiments/exit_docs.py [--docs docs]
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from exit_lines import LEAST_LOOPS, LEAST_QUALITY, Gain, clear, gains, upper_line
from results import each
from shared import FAINT, STYLE, render

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Figures = dict[str, Any]
# What the page and the plot call a criterion, what it reads, and its colour, marker and dashes (Okabe and Ito).
CRITERIA: dict[str, tuple[str, str, str, str]] = {
    "entropy": ("entropy of the head", "the head, every loop", "#0072b2", "o"),
    "margin": ("lead of the best word", "the head, every loop", "#56b4e9", "s"),
    "kl": ("KL between loops", "the head, every loop", "#cc79a7", "^"),
    "same": ("best word stands still", "the head, every loop", "#e69f00", "v"),
    "gate": ("exit gate", "nothing more: the loop gives it", "#d55e00", "D"),
    "change": ("change of the hidden state", "the hidden state, read back", "#009e73", "P"),
}
ROWS = {
    "even": "the shipped recipe",
    "even-gate": "the shipped recipe, then the stage gate",
    "letters": "a MELT of 0.2 million weights on the King James Bible",
    "letters-gate": "the same, then the stage gate",
    "text": "a MELT of 7.8 million weights, trained to decode",
    "text-gate": "the same, then the stage gate",
}
TASKS = {"addition": "Addition", "letters": "Text, letter by letter", "text": "Text"}
_HEADS = ("entropy", "margin", "kl", "same")


def shown(task: str, quality: float) -> float:
    """Return a quality as the page shows it: percent right, or perplexity."""
    return 100 * quality if task == "addition" else math.exp(-quality)


def section(task: str, name: str, row: Figures) -> Figures:
    """Return what the template needs of a row."""
    seeds = row["seeds"]
    found = {criterion: gains(seeds, criterion) for criterion in _compared(name)}
    above = {criterion: [gain.depth for gain in each_depth if gain.above] for criterion, each_depth in found.items()}
    return {
        "title": ROWS.get(name, name),
        "seeds": len(seeds),
        "sample": row["sample"],
        "head_share": statistics.fmean(seed["head_share"] for seed in seeds),
        "fixed": [_fixed(task, seeds, at) for at in range(seeds[0]["loops"])],
        "gains": [_line(task, criterion, found[criterion]) for criterion in CRITERIA if criterion in found],
        "heads": [f"at {gain.depth:g} loops" for gain in next(iter(found.values()))],
        "first": f"{next(iter(found.values()))[0].depth:g}",
        "wholly": [CRITERIA[one][0] for one, depths in above.items() if len(depths) == len(found[one])],
        "partly": [f"{CRITERIA[one][0]} (at {_listed(d)})" for one, d in above.items() if 0 < len(d) < len(found[one])],
        "never": [CRITERIA[one][0] for one, depths in above.items() if not depths],
    }


def _compared(name: str) -> tuple[str, ...]:
    """Return a row's criteria: after the stage gate only the gate is another."""
    return ("gate",) if name.endswith("-gate") else tuple(CRITERIA)


def _listed(depths: list[float]) -> str:
    return ", ".join(f"{depth:g}" for depth in depths)


def _fixed(task: str, seeds: list[Figures], at: int) -> list[str]:
    values = [[shown(task, seed[line][at]["quality"]) for seed in seeds] for line in ("fixed", "fixed, prompt too")]
    digits = 1 if task == "addition" else 2
    show = f"{{:.{digits}f}}".format
    return [str(at + 1), *(f"{show(statistics.fmean(one))} ({each(one, show)})" for one in values)]


def _line(task: str, criterion: str, found: list[Gain]) -> list[str]:
    """Return a line of the table: per depth, the loops that are saved, and what is better at equal cost."""
    cells = []
    for gain in found:
        saved = [one for one in gain.loops if one is not None]
        text = f"{statistics.fmean(saved):+.2f}" if len(saved) == len(gain.loops) else "not reached"
        spread = f" ± {statistics.stdev(saved):.2f}" if len(saved) == len(gain.loops) > 1 else ""
        reached = len(saved) == len(gain.loops)
        better = _better(task, gain)
        loops_clear, better_clear = reached and clear(saved, LEAST_LOOPS), clear(gain.quality, LEAST_QUALITY)
        cells.append(f"{_bold(text + spread, loops_clear)}; {_bold(better, better_clear)}")
    return [CRITERIA[criterion][0], CRITERIA[criterion][1], *cells]


def _bold(text: str, wanted: bool) -> str:
    return f"**{text}**" if wanted else text


def _better(task: str, gain: Gain) -> str:
    if not all(map(math.isfinite, gain.quality)):
        return "–"
    scale, unit = (100, "points") if task == "addition" else (-100, "% perplexity")
    values = [scale * one if task == "addition" else 100 * math.expm1(-one) for one in gain.quality]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.1f}{spread} {unit}"


def draw(content: Figures, docs: Path) -> None:
    """Draw every task's picture: quality against cost, one panel per row and seed."""
    for task, rows in content["tasks"].items():
        seeds = max(len(row["seeds"]) for row in rows.values())
        with plt.rc_context(STYLE):
            size = (4.2 * seeds, 3.9 * len(rows))
            figure, axes = plt.subplots(len(rows), seeds, figsize=size, layout="constrained", squeeze=False)
            for line, (name, row) in zip(axes, rows.items(), strict=True):
                for panel, seed in zip(line, row["seeds"], strict=False):
                    _panel(panel, task, seed, _compared(name))
                    panel.set_title(f"{name}, seed {row['seeds'].index(seed)}", fontsize=9.5)
            figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * seeds - 1)
            figure.savefig(docs / f"exits_{task}.png", dpi=130, facecolor="white", metadata={"Software": ""})
            plt.close(figure)


def _panel(panel: Any, task: str, seed: Figures, criteria: tuple[str, ...]) -> None:
    fixed = [(point["cost"], shown(task, point["quality"])) for point in seed["fixed"]]
    panel.plot(*zip(*fixed, strict=True), color=FAINT, marker="x", linestyle="--", label="fixed depth and mixtures")
    values = [value for _, value in fixed]
    for criterion in criteria:
        title, _, color, marker = CRITERIA[criterion]
        points = [(p["cost"], p["quality"]) for p in seed["criteria"][criterion]]
        capped = len({p.get("most") for p in seed["criteria"][criterion]}) > 1
        points = [(cost, shown(task, quality)) for cost, quality in (upper_line(points) if capped else sorted(points))]
        dashes = "-" if criterion in _HEADS else (0, (3, 1))
        panel.plot(
            *zip(*points, strict=True),
            color=color,
            marker=marker,
            markersize=4,
            linestyle=dashes,
            linewidth=1.3,
            label=title,
        )
    low, high = (80.0, 100.5) if task == "addition" else (min(values) * 0.98, values[0] * 1.02)
    panel.set_ylim(low, high)
    panel.set_xlabel("loops per written token, further heads counted")
    panel.set_ylabel("exactly right, %" if task == "addition" else "perplexity")


def markdown(content: Figures) -> str:
    """Write docs/adaptive-depth.md."""
    tasks = [
        {"name": task, "title": TASKS[task], "rows": [section(task, name, row) for name, row in rows.items()]}
        for task, rows in content["tasks"].items()
    ]
    used = {name: content[name] for name in ("date", "machine", "versions")}
    return render("adaptive_depth.md.j2", tasks=tasks, **used)


def main(
    docs: Annotated[Path, typer.Option(help="Directory of exits.json; the results go there.")] = Path("docs"),
) -> None:
    """Write adaptive-depth.md and the plots from exits.json (needs matplotlib)."""
    content = json.loads((docs / "exits.json").read_text(encoding="utf-8"))
    draw(content, docs)
    (docs / "adaptive-depth.md").write_text(markdown(content), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
