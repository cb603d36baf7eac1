"""Plots of the section "comparison", which compare.py writes, and the names that they and the document give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import FAINT, STYLE

Row = dict[str, Any]
OURS = "MELT, one loop"
PLAIN_GB = 7.07  # Qwen3-1.7B at 32,000 tokens in float16: arXiv 2605.07721
_COLORS = {"melt": "#0b6bcb", "looplm": "#d1700f", "plain": "#6e7781"}
_NAMES = {"melt": "MELT", "looplm": "LoopLM"}
_RIVALS = {OURS: _COLORS["melt"], "onnxruntime-genai": "#d1700f", "llama.cpp": "#7a3e9d"}


def label(name: str) -> str:
    """Name a package: "melt-1024-block-128" -> "MELT, blocks of 128"."""
    kind = _NAMES[name.partition("-")[0]]
    return f"{kind}, blocks of {name.rpartition('-')[2]}" if "-block-" in name else kind


def named(name: str) -> Row:
    """Return a rival's name, its threads (None for its own choice) and how it ran, in words.

    "melt, 2 threads" -> "MELT, one loop", 2, "2 threads"; "llama.cpp, 2 threads, not spinning" -> "llama.cpp", 2,
    "2 threads, not spinning".
    """
    rival, _, how = name.partition(", ")
    threads = int(how.split()[0]) if how else None
    return {"rival": OURS if rival == "melt" else rival, "threads": threads, "how": how or "its own choice"}


def smollm2_turns(section: Row) -> Iterator[tuple[int, str, Row]]:
    """Yield the number of busy processes, the context and what was found, quiet ones first."""
    for busy, by_context in {"0": section.get("turns", {}), **section.get("beside", {})}.items():
        for context, found in by_context.items():
            yield int(busy), context, found


def plots(report: Row, directory: Path) -> None:
    """Draw decode.png, memory.png and smollm2.png, if they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, section, draw in (("decode", "decode", _decode_panel), ("memory", "long", _memory_panel)):
        if section not in report:
            continue
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
            draw(axes, report[section], report["settings"])
            figure.savefig(directory / f"{name}.png", dpi=150, facecolor="white", metadata={"Software": ""})
            plt.close(figure)
    if "smollm2" in report:
        with plt.rc_context(STYLE):
            figure = _smollm2_figure(plt, report["smollm2"])
            figure.savefig(directory / "smollm2.png", dpi=150, facecolor="white", metadata={"Software": ""})
            plt.close(figure)


def _end(axes: Any, text: str, at: tuple[float, float], color: str, align: str = "center") -> None:
    """Write a line's name behind its end."""
    axes.annotate(
        text, at, xytext=(9, 0), textcoords="offset points", va=align, color=color, weight="bold", annotation_clip=False
    )


def _decode_panel(axes: Any, section: Row, settings: Row) -> None:
    names = list(dict.fromkeys(row["package"] for row in section["results"]))
    for name in names:
        rows = [row for row in section["results"] if row["package"] == name]
        kind = name.partition("-")[0]
        x = [row["context"] for row in rows]
        y = [row["decode_tokens_s"]["median"] for row in rows]
        spread = [
            [abs(row["decode_tokens_s"][side] - row["decode_tokens_s"]["median"]) for row in rows]
            for side in ("low", "high")
        ]
        dashes = (0, (4, 2)) if "-block-" in name else "-"
        look = {"color": _COLORS[kind], "linestyle": dashes, "marker": "o", "markersize": 5, "capsize": 2.5}
        axes.errorbar(x, y, yerr=spread, label=label(name), **look)
    for name, found in section["eager"].items():
        precision, context = name.split("/")
        y = 1 / found[f"eager {precision}"]["token_s"]["median"]
        axes.plot(int(context), y, "s" if precision == "fp32" else "D", color=_COLORS["plain"], markersize=5)
        if name == f"{precision}/{max(settings['eager_contexts'])}":
            look = {"textcoords": "offset points", "color": FAINT, "va": "top" if precision == "fp32" else "bottom"}
            axes.annotate(f"PyTorch, {precision}", (int(context), y), xytext=(9, 0), **look)
    axes.legend(loc="upper right", frameon=False, ncols=len(names))
    axes.set(xlabel="tokens in the cache", ylabel=f"tokens/s at {settings['loops']} loops")
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.margins(x=0.05)
    axes.set_title("Decoding, 1.4B shape, int4 weights")


def _memory_panel(axes: Any, section: Row, settings: Row) -> None:
    """Draw MELT's measured peaks, a LoopLM's computed from the same weights and caches, and the paper's plain
    transformer."""
    styles, aligned = {"int8": "-", "int4": (0, (4, 2))}, {"int8": "center", "int4": "top"}
    most = 1
    for kind, found in section.items():
        measured = {int(name.split()[0]): value["peak_bytes"] for name, value in found.items() if "loops" in name}
        if None in measured.values():
            continue
        most = max(measured)
        melt = [measured[count] / 1e9 for count in sorted(measured)]
        axes.plot(sorted(measured), melt, color=_COLORS["melt"], linestyle=styles[kind], marker="o")
        _end(axes, f"MELT, {kind} cache: {melt[-1]:.1f}", (most, melt[-1]), _COLORS["melt"], aligned[kind])
        fixed = measured[min(measured)] - found["cache_bytes"]
        looplm = [(fixed + count * found["cache_bytes"]) / 1e9 for count in (1, most)]
        axes.plot((1, most), looplm, color=_COLORS["looplm"], linestyle=styles[kind])
        label = f"LoopLM, {kind} caches: {looplm[-1]:.1f}\n(computed)"
        _end(axes, label, (most, looplm[-1]), _COLORS["looplm"])
    axes.plot((1, most), (PLAIN_GB, PLAIN_GB), color=_COLORS["plain"], linestyle=":")
    label = f"plain 1.7B transformer,\nfloat16: {PLAIN_GB:.1f} (the paper's)"
    _end(axes, label, (most, PLAIN_GB), _COLORS["plain"], "bottom")
    axes.set(xlabel="loops per token", ylabel=f"peak memory at {settings['long_rows']:,} tokens, GB")
    axes.set_ylim(0, None)
    axes.set_title("More loops, the same memory")


def _smollm2_figure(plt: Any, section: Row) -> Any:
    """Draw tokens/s by threads: a row of panels per number of busy processes, a column per measure, a bar per rival.

    A bar is the faster of waiting threads awake and asleep; the runtime's own choice is a group of its own.
    """
    rows: dict[int, list[tuple[str, str, Row]]] = {}
    for busy, context, found in smollm2_turns(section):
        prompt = section.get("prompts", {}).get(context)
        rows.setdefault(busy, []).append(("token_s", f"decoding, {context} tokens in the cache", found))
        if prompt:
            rows[busy].append(("prefill_s", f"prefill of {prompt} tokens", found))
    columns = max(map(len, rows.values()))
    size = (3.1 * columns, 2.5 * len(rows) + 0.6)
    figure, grid = plt.subplots(len(rows), columns, figsize=size, sharey="col", squeeze=False, layout="constrained")
    for line, (busy, measures) in zip(grid, rows.items(), strict=True):
        measures.sort(key=lambda measure: measure[0] != "token_s")
        for axes, (measure, title, found) in zip(line, measures, strict=False):
            tokens = 1 if measure == "token_s" else int(title.split()[2])
            _bars(axes, {name: tokens / one[measure]["median"] for name, one in found.items()})
            axes.set_title(f"{title}\n{f'beside {busy} busy' if busy else 'quiet'}", fontsize=9.5)
        line[0].set_ylabel("tokens/s")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", frameon=False, ncols=len(names))
    return figure


def _bars(axes: Any, speeds: dict[str, float]) -> None:
    """Draw each rival's speed in groups by threads."""
    best: dict[tuple[int | None, str], float] = {}
    for name, speed in speeds.items():
        key = named(name)["threads"], named(name)["rival"]
        best[key] = max(best.get(key, 0), speed)
    groups: list[int | None] = sorted({threads for threads, _ in best if threads})
    groups += [None] if any(threads is None for threads, _ in best) else []
    rivals = [rival for rival in _RIVALS if any(rival == one for _, one in best)]
    width = 0.8 / len(rivals)
    for at, rival in enumerate(rivals):
        shift = (at - (len(rivals) - 1) / 2) * width
        found = [(group, best[threads, rival]) for group, threads in enumerate(groups) if (threads, rival) in best]
        # the runtime's own choice has no rival beside it
        x = [group + (shift if groups[group] else 0) for group, _ in found]
        axes.bar(x, [speed for _, speed in found], width * 0.92, color=_RIVALS[rival], label=rival)
    axes.set_xticks(range(len(groups)), [_threads(threads) for threads in groups])
    axes.grid(visible=False, axis="x")


def _threads(count: int | None) -> str:
    return "own choice" if count is None else f"{count} thread{'s' * (count > 1)}"
