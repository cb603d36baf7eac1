"""Values of the template comparison.md.j2, and its plots, from the section "comparison", which compare.py writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import FAINT, STYLE, plural
from templating import render

Row = dict[str, Any]
_COLORS = {"melt": "#0b6bcb", "looplm": "#d1700f", "plain": "#6e7781"}
_NAMES = {"melt": "MELT", "looplm": "LoopLM"}
_PLAIN_GB = 7.07  # Qwen3-1.7B at 32,000 tokens in float16: arXiv 2605.07721


def _inverse(values: Row) -> Row:
    """Return how many times as long the other side took."""
    return {name: 1 / values[other] for name, other in (("low", "high"), ("median", "median"), ("high", "low"))}


def part(report: Row) -> str:
    """Write every section that was measured."""
    measured = {name: report.get(name) for name in _TITLES}
    decode, smollm2, long = (measured[name] for name in ("decode", "smollm2", "long"))
    return render(
        "comparison.md.j2",
        **measured | {"smollm2": smollm2 and _smollm2(smollm2), "long": long and _long(long)},
        section=report,
        settings=report["settings"],
        later=report.get("later", {}),
        titles=_TITLES,
        label=_label,
        eager=_eager(decode) if decode else [],
        threads=_threads(decode) if decode else [],
        plain_gb=_PLAIN_GB,
    )


def _label(name: str) -> str:
    """Name a package: "melt-1024-block-128" -> "MELT, blocks of 128"."""
    kind = _NAMES[name.partition("-")[0]]
    return f"{kind}, blocks of {name.rpartition('-')[2]}" if "-block-" in name else kind


def _eager(decode: Row) -> list[Row]:
    """Pair PyTorch's figures with each package's, by precision and context."""
    rows = []
    for name, found in decode["eager"].items():
        precision, context = name.split("/")
        (_, theirs), *packages = found.items()
        for package, ours in packages:
            times = _inverse(ours["time_against_first"])
            row = {"precision": precision, "context": context, "package": _label(package)}
            rows.append({**row, "theirs": theirs, "ours": ours, "times_as_long": times})
    return rows


def _threads(decode: Row) -> list[str]:
    """Say how many threads each rival had, if several were tried."""
    return [
        f"{name.replace('eager', 'PyTorch') if 'eager' in name else _label(name)}: {found['threads']}"
        for name, found in decode.get("threads", {}).items()
    ]


def _long(section: Row) -> Row:
    """List the caches with their peaks, and the numbers of loops at which these were measured."""
    counts = [name for name in next(iter(section.values())) if name.endswith(" loops")]
    caches = []
    for kind, found in section.items():
        peaks = [found[name]["peak_bytes"] for name in counts]
        shown = ["-" if peak is None else f"{peak / 1e9:.3f} GB" for peak in peaks]
        caches.append({**found, "kind": kind, "peaks": shown})
    return {"loops": [plural(int(name.split()[0]), "loop") for name in counts], "caches": caches}


def _rival(name: str) -> tuple[str, str]:
    """Return a rival's name in a table and its threads: "melt, 2 threads" -> ("MELT, one loop", "2")."""
    rival, _, threads = name.partition(", ")
    return "MELT, one loop" if rival == "melt" else rival, threads.partition(" ")[0] or "default"


def _smollm2(section: Row) -> Row:
    """List what each rival reached, by busy processes and context, and each one's fastest number of threads."""
    turns = []
    by_busy = {"0": section.get("turns", {}), **section.get("beside", {})}
    for busy, context, found in ((int(busy), *pair) for busy, each in by_busy.items() for pair in each.items()):
        rows = []
        fastest: dict[str, tuple[float, str]] = {}
        for name, one in found.items():
            rival, threads = _rival(name)
            mine = (one["token_s"]["median"], threads)
            fastest[rival] = min(fastest.get(rival, mine), mine)
            rows.append({**one, "rival": rival, "threads": threads})
        best = [f"{rival} {1 / seconds:.1f} tokens/s ({threads})" for rival, (seconds, threads) in fastest.items()]
        turns.append({"busy": busy, "context": context, "rows": rows, "fastest": best})
    return {
        "turns": turns,
        "builder": section.get("genai", {}).get("builder"),
        "skipped": section.get("skipped", {}),
        "bench": section.get("bench"),
    }


_TITLES = {
    "decode": "decoding at the 1.4B shape",
    "smollm2": "SmolLM2-135M",
    "buffer": "the large buffer",
    "loops": "more loops",
    "long": "the long cache",
}


def plots(report: Row, directory: Path) -> None:
    """Draw decode.png and memory.png, if they were measured."""
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
        axes.errorbar(x, y, yerr=spread, label=_label(name), **look)
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
    axes.plot((1, most), (_PLAIN_GB, _PLAIN_GB), color=_COLORS["plain"], linestyle=":")
    label = f"plain 1.7B transformer,\nfloat16: {_PLAIN_GB:.1f} (the paper's)"
    _end(axes, label, (most, _PLAIN_GB), _COLORS["plain"], "bottom")
    axes.set(xlabel="loops per token", ylabel=f"peak memory at {settings['long_rows']:,} tokens, GB")
    axes.set_ylim(0, None)
    axes.set_title("More loops, the same memory")
