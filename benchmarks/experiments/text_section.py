"""The section of docs/experiments.md on text, and its plot, from docs/text.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from shared import FAINT, INK, STYLE
from text_runs import COLUMNS, LOOPS, ROWS, SEEDS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Figures = dict[str, Any]
CHUNKS = (1, 8, 32, 128, 512)
# Colour and title of a checkpoint, by run and stage.
_LINES = dict(
    zip(
        COLUMNS,
        (("#d55e00", "after phase 1"), ("#0072b2", "after phase 2"), ("#009e73", "trained to decode")),
        strict=True,
    )
)


def read(file: Path) -> Figures | None:
    """Return the content of docs/text.json, or None if there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def seeds(content: Figures, column: tuple[str, str], setting: str) -> list[float]:
    """Return a figure of a checkpoint, by seed. ``column``: its run and stage."""
    run, stage = column
    found = (content["measured"].get(f"{run}-{seed}/{stage}", {}).get(setting) for seed in SEEDS)
    return [value for value in found if value is not None]


def shown(values: list[float]) -> str:
    """Format the values of all seeds: "23.8, 24.5"."""
    return ", ".join(f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" for value in values) or "–"


def trained(content: Figures, stage: str, loops: int) -> list[float]:
    """Return the perplexity that training measured at a depth, by seed."""
    found = (content["training"][f"main-{seed}"]["stages"][stage]["loops"].get(str(loops)) for seed in SEEDS)
    return [value for value in found if value is not None]


def section(content: Figures | None) -> Figures | None:
    """Return what the template needs."""
    if content is None:
        return None
    depths = range(1, 2 * LOOPS + 1)
    main = content["training"]["main-0"]
    first = content["training"]["gate-0"]["stages"] if "gate-0" in content["training"] else None
    return {
        "loops": [
            [
                str(at),
                shown(trained(content, "teacher", at)),
                shown(trained(content, "phase1", at)),
                *(shown(seeds(content, column, f"{at} loops")) for column in COLUMNS[1:]),
            ]
            for at in depths
        ],
        "decoded": [
            [
                str(at),
                *(
                    shown(seeds(content, column, name))
                    for column in COLUMNS
                    for name in (f"the same tokens in chunks, {at} loops", f"decoded, {at} loops")
                ),
            ]
            for at in range(1, LOOPS + 1)
        ],
        "chunks": [
            [
                str(size),
                *(shown(seeds(content, column, f"chunks of {size}, {LOOPS} loops")) for column in COLUMNS),
            ]
            for size in CHUNKS
        ],
        "ablations": [
            [
                row.title,
                *(shown(_of_row(content, row.name, stage, "loops", str(LOOPS))) for stage in ("phase1", "phase2")),
                shown(_of_row(content, row.name, "phase2", "chunks", "1")),
            ]
            for row in ROWS
        ],
        "ablation_steps": {name: stage["steps"] for name, stage in first.items()} if first else {},
        "quantized": [
            [
                name,
                f"{found['weights_bytes'] / 1e6:.1f}",
                f"{found['cache_bytes_per_token']:,}",
                *(f"{found[key]:.2f}" for key in found if "loops" in key),
            ]
            for name, found in content["quantized"].items()
        ],
        "pipelined": [
            [
                name,
                f"{one['runs_per_token']:.2f}",
                ", ".join(f"{kept} of {kept + lost}" for kept, lost in zip(one["held"], one["dropped"], strict=True)),
            ]
            for name, one in content.get("pipelined", {}).items()
        ],
        "decoding": content.get("decoding", {}),
        "stages": main["stages"],
        "device": main["device"],
        "sources": content["data"]["sources"],
        "sequences": content["sequences"] * len(content["data"]["sources"]),
        "length": content["length"],
        "date": content["date"],
        "more": sum(main["held_out_sequences"].values()),
    }


def _of_row(content: Figures, row: str, stage: str, curve: str, setting: str) -> list[float]:
    runs = (content["training"].get(f"{row}-{seed}") for seed in SEEDS)
    stages = (run["stages"][stage] for run in runs if run is not None)
    found = (None if "shared" in one else one[curve].get(setting) for one in stages)
    return [value for value in found if value is not None]


def draw(content: Figures | None, path: Path) -> None:
    """Draw perplexity against loops and against chunk size; without figures nothing is drawn."""
    if content is None:
        return
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        _draw_loops(left, content)
        _draw_chunks(right, content)
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": ""})
        plt.close(figure)


def _draw_loops(axes: Any, content: Figures) -> None:
    for seed in SEEDS:
        stages = content["training"][f"main-{seed}"]["stages"]
        for stage, color in (("teacher", FAINT), ("phase1", _LINES[COLUMNS[0]][0])):
            points = {int(at): value for at, value in stages[stage]["loops"].items()}
            label = {"teacher": "teacher", "phase1": "after phase 1"}[stage] if seed == SEEDS[0] else None
            axes.plot(list(points), list(points.values()), color=color, marker="s", label=label)
        for run, stage in COLUMNS[1:]:
            color, title = _LINES[run, stage]
            mine = content["measured"].get(f"{run}-{seed}/{stage}", {})
            for form, dashes, how in (
                ("{} loops", "-", "in chunks"),
                ("decoded, {} loops", (0, (3, 2)), "token by token"),
            ):
                points = {at: mine[form.format(at)] for at in range(1, 2 * LOOPS + 1) if form.format(at) in mine}
                label = f"{title}, {how}" if seed == SEEDS[0] else None
                axes.plot(list(points), list(points.values()), color=color, ls=dashes, marker="o", label=label)
    axes.set_yscale("log")
    axes.set_ylim(20, 150)
    axes.axvline(LOOPS, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_xlabel("loops (4 were trained); loop 1 of teacher and phase 1 is above 18,000")
    axes.set_ylabel("perplexity of held-out text")
    axes.legend(fontsize=8.5)


def _draw_chunks(axes: Any, content: Figures) -> None:
    for (run, stage), (color, title) in _LINES.items():
        for seed in SEEDS:
            mine = content["measured"].get(f"{run}-{seed}/{stage}", {})
            points = {size: mine[name] for size in CHUNKS if (name := f"chunks of {size}, {LOOPS} loops") in mine}
            label = title if seed == SEEDS[0] else None
            axes.plot(list(points), list(points.values()), color=color, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens per chunk, 4 loops")
    axes.set_ylabel("perplexity of held-out text")
    axes.legend(fontsize=8.5)
