"""Writes docs/experiments.md and its plots from docs/experiments.json; none of them is edited by hand.

    python benchmarks/experiments/document.py [--docs docs]

The text is in benchmarks/templates/experiments.md.j2. Sentences that compare are computed from the figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from ablations import EQUAL, PAPER_AGGREGATIONS, PAPER_LEFT_OUT, PHASES, ablation
from curves import chunks, depth
from distance import PAPER_DISTANCE, distance
from plots import draw_all
from results import Results
from runs import AGGREGATIONS, DEPTHS, EVEN, EVERYTHING, LEFT_OUT, LONG_STEPS, SEEDS, TEACHER, TUNED
from shared import render
from text_section import draw, read, section


def values(results: Results) -> dict[str, Any]:
    """Return what the template needs. A section without runs is None."""
    content, runs = results.content, results.runs
    everything = results.row(EVERYTHING.name)
    return {
        **{name: content[name] for name in ("date", "machine", "missing", "quick", "versions")},
        "runs": len(runs),
        "hours": hours(results),
        "problems": runs[0]["problems"] if runs else 0,
        "planned_seeds": len(SEEDS),
        "entropy_weight": TEACHER["entropy_weight"],
        "tuned": TUNED,
        "tuned_steps": LONG_STEPS[1],
        "even": EVEN,
        "depths": DEPTHS[0],
        "depths_last": DEPTHS[1],
        "paper_distance": PAPER_DISTANCE,
        "equal": EQUAL,
        "distance": distance(results),
        "budget": {phase: everything[0]["content"][phase] for phase in PHASES} if everything else None,
        "aggregations": ablation(results, AGGREGATIONS, PAPER_AGGREGATIONS, "phase1"),
        "left_out": ablation(results, LEFT_OUT, PAPER_LEFT_OUT, "phase2"),
        "depth": depth(results),
        "chunks": chunks(results),
        "losses": results.run("main-0") is not None,
        "settings": settings(results),
    }


def hours(results: Results) -> float:
    """Return the time of training and measuring all runs."""
    seconds = (sum(s["seconds"] for s in run["stages"].values()) + run["measuring_seconds"] for run in results.runs)
    return sum(seconds) / 3600


def settings(results: Results) -> str | None:
    """Return the settings of main-0 and its teacher as YAML, or None before main-0 has been measured."""
    shown, teacher = results.run("main-0"), results.run("teacher-0")
    if shown is None:
        return None
    config = {key: value for key, value in shown["content"].items() if key not in ("output", "teacher")}
    if teacher is not None:
        config |= {key: teacher["content"][key] for key in ("model", "teacher")}
    return yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=110).rstrip("\n")


def markdown(results: Results, text: dict[str, Any] | None = None) -> str:
    """Write docs/experiments.md. ``text``: the content of docs/text.json, or None."""
    return render("experiments.md.j2", **values(results), text=section(text))


def write_documents(docs: Path) -> None:
    """Rewrite experiments.md and the plots in ``docs`` from its experiments.json and text.json."""
    results = Results.read(docs / "experiments.json")
    text = read(docs / "text.json")
    draw_all(results, docs)
    draw(text, docs / "experiments_text.png")
    (docs / "experiments.md").write_text(markdown(results, text), encoding="utf-8")


def main(
    docs: Annotated[Path, typer.Option(help="Directory of experiments.json; the results go there.")] = Path("docs"),
) -> None:
    """Write experiments.md and the plots from experiments.json (needs matplotlib)."""
    write_documents(docs)


if __name__ == "__main__":
    typer.run(main)
