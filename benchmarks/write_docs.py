"""Writes docs/benchmarks.md and docs/loop_step.png from docs/benchmarks.json; neither is edited by hand.

    python benchmarks/write_docs.py

Needs matplotlib: pip install 'melt-export[bench]'. The JSON file has the section "loop_step" (loop_step.py) and, if
they were measured, "export" (one export of a real-size checkpoint), "engines" (engine_build.py), "batching"
(batching.py), "comparison" (compare.py), "quantization" (quantization.py) and "training_memory" (training_memory.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import compare_docs
import numpy as np
import quantization
import typer
from common import DOCS, FAINT, STYLE, clock, console_block, facts, human, plural, table
from templating import render

_COLORS = ("#d1700f", "#7a3e9d", "#0b6bcb")
_MARKERS = ("o", "s", "D")

Row = dict[str, Any]


def slope(rows: list[Row]) -> float:
    """Return the microseconds that 1,000 more tokens in the cache add to a step, fitted to the largest buffer's
    medians."""
    largest = [row for row in rows if row["rows"] == max(r["rows"] for r in rows)]
    return 1000 * float(np.polyfit([r["tokens"] for r in largest], [r["median_us"] for r in largest], 1)[0])


def time_part(report: Row) -> str:
    """Write the section on a step's time."""
    rows, settings = report["time"], report["settings"]
    large = max(row["rows"] for row in rows)
    ratios = [row["ratio"] for row in rows if row["rows"] == large]
    cells = [
        [
            f"{r['tokens']:,}",
            f"{r['rows']:,}",
            f"{r['median_us']:,.0f}",
            f"{r['quartiles_us'][0]:,.0f} to {r['quartiles_us'][1]:,.0f}",
            "(base)"
            if r["rows"] == r["against_rows"]
            else f"{r['ratio']:.3f} ({r['ratio_quartiles'][0]:.3f} to {r['ratio_quartiles'][1]:.3f})",
        ]
        for r in rows
    ]
    head = ["tokens in the cache", "size of the buffer", "median, µs", "quartiles, µs", "ratio to the smallest buffer"]
    return (
        "## Time of one loop step at decode\n\n"
        "One token runs its loops over a cache of some tokens, in a buffer with room for more. "
        f"{plural(settings['layers'], 'layer')} of the {settings['shape']} shape, random weights, "
        f"{settings['precision']}, {settings['dialect']} dialect, one sequence, "
        f"{plural(settings['threads'], 'thread')}. A step must read all weights of the layers and the keys and values "
        "of the tokens; the question is whether the rest of the buffer costs anything.\n\n"
        + table(head, cells)
        + f"\nAt equal tokens, the buffer for {large:,} tokens took {min(ratios):.3f} to {max(ratios):.3f} times as "
        "long as the smallest buffer that holds them. "
        f"1,000 more tokens in the cache add {slope(rows):,.0f} µs per step.\n\n"
        f"All configurations take turns for {settings['rounds']} rounds, in alternating order; a turn is one token "
        f"with {settings['time_loops']} loops, of which the first is not counted ({rows[0]['steps']} steps per "
        "configuration). The ratio is taken within each round, then its median and quartiles over the rounds, so that "
        "a slow moment of the machine does not matter.\n"
    )


def memory_part(report: Row) -> str:
    """Write the sections on memory."""
    settings, loops, long = report["settings"], report["loops"], report["long"]
    rows = settings["memory_rows"]
    cells = [
        [
            f"{r['loops']}",
            f"{r['state_bytes']:,}",
            f"{r['peak_bytes']:,}",
            f"{r['loops'] * r['cache_bytes_a_loop']:,}",
        ]
        for r in loops
    ]
    peaks = [r["peak_bytes"] for r in loops]
    settled = [s for s in long if s["tokens"] > 1]
    grown = settled[-1]["resident_bytes"] - settled[0]["resident_bytes"]
    samples = [[f"{s['tokens']:,}", f"{s['resident_bytes']:,}"] for s in long]
    return (
        "## Memory against the number of loops\n\n"
        f"Each number of loops has a fresh process: load the package, open a session for {rows:,} tokens, generate "
        f"{loops[0]['tokens']} tokens. Peak resident memory is VmHWM and counts the program, the weights and "
        "the state. The last column is computed, not measured: the caches of a LoopLM of the same shape, precision and "
        "length, which keeps one cache per loop.\n\n"
        + table(["loops", "state, bytes", "peak resident, bytes", "LoopLM caches (computed), bytes"], cells)
        + f"\nThe state is {'the same' if len({r['state_bytes'] for r in loops}) == 1 else 'NOT the same'} for every "
        f"number of loops; peak resident memory differs by {max(peaks) / min(peaks) - 1:.2%} at most.\n\n"
        "## Memory while generating\n\n"
        f"One process generates {settings['long_tokens']:,} tokens, {settings['long_loops']} loops each; resident "
        f"memory (VmRSS) every {settings['long_every']} tokens. From {settled[0]['tokens']:,} to "
        f"{settled[-1]['tokens']:,} tokens it changed by {grown:+,} bytes ({grown / settled[0]['resident_bytes']:+.3%})"
        ".\n\n" + table(["tokens", "resident, bytes"], samples)
    )


def export_part(export: Row) -> str:
    """Write the section on exporting a real-size checkpoint."""
    cells = [
        ["peak resident memory", f"{export['peak_resident_kib']:,} KiB ({human(export['peak_resident_kib'] * 1024)})"],
        ["wall time", clock(export["wall_seconds"])],
        [
            "verification: peak resident memory",
            f"{export['verified_peak_kib']:,} KiB ({human(export['verified_peak_kib'] * 1024)})",
        ],
        ["verification: wall time", clock(export["verified_wall_seconds"])],
        ["checkpoint", f"{export['checkpoint_bytes']:,} bytes ({human(export['checkpoint_bytes'])})"],
        ["package", f"{export['package_bytes']:,} bytes ({human(export['package_bytes'])})"],
    ]
    return (
        f"## Exporting the {export['shape']} shape\n\n{export['note']}\n\n"
        + console_block(*export["commands"])
        + f"\n{facts(export)}\n"
        + table(["", "measured"], cells)
    )


def engines_part(section: Row) -> str:
    """Write the section on building engines."""
    builds = section["builds"]
    graphs = [graph for graph in ("embed", "loop_step", "lm_head") if graph in builds[0]["plans"]]
    cells = [
        [
            precision_name(build["name"]),
            clock(build["seconds"]),
            human(build["peak_bytes"]),
            *(human(build["plans"][graph]) for graph in graphs),
            human(sum(build["plans"].values())),
        ]
        for build in builds
    ]
    head = ["precision", "time", "peak resident memory", *(f"plan of {graph}" for graph in graphs), "all plans"]
    part = "all " if section["layers"] == section["shape_layers"] else ""
    return (
        "## Engines\n\n"
        f"Building TensorRT-RTX engines on the CPU, without a GPU: {part}{plural(section['layers'], 'layer')} of the "
        f"{section['shape']} shape, random weights, a cache for {section['rows']:,} tokens, three plans each. Each "
        "build has a process of its own; peak resident memory is its VmHWM. These engines were built, not run.\n\n"
        + console_block(section["command"])
        + f"\n{facts(section)}\n"
        + table(head, cells)
    )


def precision_name(build: str) -> str:
    """Name a build's precision: "fp16-int4" -> "fp16, int4 weights"."""
    precision, _, weights = build.partition("-")
    return f"{precision}, {weights} weights" if weights else precision


def training_part(section: Row) -> str:
    """Write the section on memory that training keeps for the backward pass."""
    modes, shape = section["modes"], section["shape"]
    cells = [
        [f"{r['tokens']:,}", f"{r['chunk']:,}", f"{r['loops']}", *(human(r[mode]) for mode in modes)]
        for r in section["rows"]
    ]
    return (
        "## Memory of training\n\n"
        "Bytes of all tensors that autograd keeps between the forward and the backward pass of a phase-2 step, for one "
        f"sequence (exact, counted; {plural(shape['num_hidden_layers'], 'layer')}, d = {shape['hidden_size']}, "
        f"{shape['num_attention_heads']} heads, float32). Weights, gradients, optimiser states and the teacher's cache "
        "come on top.\n\n"
        + console_block(section["command"])
        + f"\n- Date: {section['date']}\n"
        + f"- Versions: {', '.join(f'{name} {number}' for name, number in section['versions'].items())}\n\n"
        + table(["tokens", "chunk", "loops", *modes], cells)
    )


def batching_part(section: Row) -> str:
    """Write the section on continuous batching."""
    return "## Continuous batching\n\n" + render("batching.md.j2", section=section)


def quantization_part(section: Row) -> str:
    """Write the section on the cost of quantization."""
    return (
        "## Cost of quantization\n\nPackages of SmolLM2-135M at one loop against the checkpoint in float32, on "
        f"{section['rows'][0]['positions']:,} tokens that are in no calibration text. A variant is the options of "
        "melt-export.\n\n"
        + console_block(section["command"])
        + f"\n{quantization.markdown(section['rows'])}"
        + "\n![Quality against bytes.](quantization.png)\n"
    )


def markdown(content: Row) -> str:
    """Write docs/benchmarks.md."""
    report = content["loop_step"]
    comparison = [compare_docs.part(content["comparison"])] if "comparison" in content else []
    parts = [
        "# Benchmarks\n",
        "Written by `python benchmarks/write_docs.py` from `docs/benchmarks.json`; do not edit. Times of other "
        "machines will differ; the ratios and the bytes of state should not.\n",
        *comparison,
        "![Left: time of a loop step against the tokens in the cache, one line per buffer size. Right: memory against "
        "the number of loops.](loop_step.png)\n",
        f"Loop step and memory were measured with:\n\n{console_block(report['command'])}\n{facts(report)}",
        time_part(report),
        memory_part(report),
    ]
    if "quantization" in content:
        parts.append(quantization_part(content["quantization"]))
    if "export" in content:
        parts.append(export_part(content["export"]))
    if "engines" in content:
        parts.append(engines_part(content["engines"]))
    if "batching" in content:
        parts.append(batching_part(content["batching"]))
    if "training_memory" in content:
        parts.append(training_part(content["training_memory"]))
    return "\n".join(parts)


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
        compare_docs.plots(content["comparison"], directory)
    (directory / "benchmarks.md").write_text(markdown(content), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
