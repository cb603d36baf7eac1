"""Text and plots of docs/benchmarks.md for the section "comparison", which compare.py writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import FAINT, STYLE, console_block, facts, human, plural, table

Row = dict[str, Any]
_COLORS = {"melt": "#0b6bcb", "looplm": "#d1700f", "plain": "#6e7781"}
_NAMES = {"melt": "MELT", "looplm": "LoopLM"}
_PLAIN_GB = 7.07  # Qwen3-1.7B at 32,000 tokens in float16: arXiv 2605.07721


def middle(values: Row, unit: float = 1.0, digits: int = 2) -> str:
    """Format the median and the quartiles in a unit: "1.23 (1.20 to 1.31)"."""
    low, median, high = (f"{values[name] / unit:.{digits}f}" for name in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def _inverse(values: Row) -> Row:
    """Return how many times as long the other side took."""
    return {name: 1 / values[other] for name, other in (("low", "high"), ("median", "median"), ("high", "low"))}


def part(report: Row) -> str:
    """Write every section that was measured."""
    parts = [
        "## Comparison with rivals\n",
        "Rivals took turns in the same run (A B A B), each in a process of its own. Figures are medians, with "
        "quartiles in brackets. The share of bandwidth is the bytes that a step must read and write (stored weights, "
        "keys and values of the tokens in the cache, state), divided by its time and by the machine's read bandwidth "
        "with as many threads, measured just before each turn.\n",
        console_block(report["command"]),
        facts(report) + "".join(map(_later, report.get("later", {}).items())),
    ]
    for name, write in _PARTS.items():
        if name in report:
            parts.append(write(report[name], report["settings"]))
    return "\n".join(parts)


def _later(section: tuple[str, Row]) -> str:
    """Describe a section that was measured again by itself."""
    name, about = section
    load = f"load average at the start {about['machine']['load_at_start']:.1f}"
    return f"- Measured by itself: {_TITLES[name]}, {about['date']}, {load}, `{about['command']}`\n"


def _label(name: str) -> str:
    """Name a package: "melt-1024-block-128" -> "MELT, blocks of 128"."""
    kind = _NAMES[name.partition("-")[0]]
    return f"{kind}, blocks of {name.rpartition('-')[2]}" if "-block-" in name else kind


def _decode(section: Row, settings: Row) -> str:
    rows = [
        [
            _label(row["package"]),
            f"{row['context']:,}",
            middle(row["loop_ms"], digits=1),
            middle(row["decode_tokens_s"]),
            f"{row['bytes_a_loop']['total'] / 1e9:.3f}",
            middle(row["effective_bytes_s"], 1e9, 1),
            middle(row["bandwidth_share"], 0.01, 0),
        ]
        for row in sorted(section["results"], key=lambda row: row["package"])
    ]
    head = ["", "tokens in the cache", "ms per loop", "tokens/s", "GB per loop", "GB/s", "of bandwidth, %"]
    eager = []
    for name, found in section["eager"].items():
        precision, context = name.split("/")
        rival, *packages = found.items()
        for package, ours in packages:
            theirs, mine = (middle(one["loop_s"], 1e-3, 1) for one in (rival[1], ours))
            times = middle(_inverse(ours["time_against_first"]))
            eager.append([precision, context, theirs, _label(package), mine, times])
    alone = ""
    if "matmuls" in section:
        step, matmuls = (section["matmuls"][name]["loop_s"] for name in ("melt", "matmuls"))
        alone = (
            "ONNX Runtime's kernels limit the share: a package's quantized matmuls alone, on the same stored weights, "
            f"took {middle(matmuls, 1e-3, 1)} ms per loop, in turn with whole loops of "
            f"{middle(step, 1e-3, 1)} ms at {settings['contexts'][0]} tokens. More tokens in the cache add attention, "
            "which reads keys and values more slowly.\n\n"
        )
        cached, memory = section["cached_matmuls"]["bytes_s"], section["bandwidth"][0]["bytes_s"]["median"]
        alone += (
            "Over weights that stay in the processor's cache, the same kernel on the same threads reads "
            f"{middle(cached, 1e9, 1)} GB/s: its arithmetic alone needs {memory / cached['median']:.0%} of the time in "
            "which memory delivers the weights, and the two overlap only in part.\n\n"
        )
    cache = section["cache_bytes"]
    ratio = cache["looplm"] / cache["melt"]
    overhead = max(row["overhead_share"]["median"] for row in section["results"])
    return (
        f"### Decoding at the 1.4B shape\n\n{settings['layers']} layers, d = {settings['hidden']:,}, random weights, "
        f"`melt-export {settings['export']}`, {settings['loops']} loops per token, {settings['threads']} threads. "
        f"The machine reads {middle(section['bandwidth'][0]['bytes_s'], 1e9, 1)} GB/s.\n\n"
        + table(head, rows)
        + f"\nTime outside the graphs (binding, loop driver, sampling) is at most {overhead:.1%} per token. "
        f"Caches for {settings['buffers'][0]:,} tokens take {cache['melt']:,} bytes for MELT and {cache['looplm']:,} "
        f"for the LoopLM: {ratio:g} times as many at {settings['loops']} loops.\n\n"
        + alone
        + "![Tokens per second by tokens in the cache.](decode.png)\n\n"
        f"The same checkpoint in PyTorch, operator by operator{_threads(section)}:\n\n"
        + table(
            ["PyTorch", "tokens in the cache", "against", "PyTorch, ms per loop", "ms per loop", "times as long"], eager
        )
    )


def _threads(section: Row) -> str:
    """Say how many threads each rival had, if several were tried."""
    if "threads" not in section:
        return ", on the same threads"
    names = {name: name.replace("eager", "PyTorch") if "eager" in name else _label(name) for name in section["threads"]}
    found = (f"{names[name]}: {one['threads']}" for name, one in section["threads"].items())
    return f", each with its fastest number of threads ({', '.join(found)})"


def _buffer(section: Row, settings: Row) -> str:
    rows = [
        [
            f"{int(name.split()[0]):,} tokens",
            middle(found["loop_s"], 1e-3),
            middle(found["time_against_first"], digits=3),
        ]
        for name, found in section["rows"].items()
    ]
    return (
        f"### The same step in a large buffer\n\n{section['context']} tokens in the cache, the rest of it empty.\n\n"
        + table(["buffer", "ms per loop", "a token's time, relative to the first"], rows)
    )


def _loops(section: Row, settings: Row) -> str:
    rows = [
        [count, f"{found['state_bytes']:,}", f"{found['peak_bytes']:,}"] if found["peak_bytes"] else [count, "-", "-"]
        for count, found in section.items()
    ]
    return (
        "### More loops, the same memory\n\nEach row has a fresh process, from loading to the last token that fits.\n\n"
        + table(["loops", "state, bytes", "peak resident, bytes"], rows)
    )


def _long(section: Row, settings: Row) -> str:
    rows = []
    for kind, found in section.items():
        peaks = [value["peak_bytes"] for name, value in found.items() if name.endswith(" loops")]
        cells = [human(found[name]) for name in ("weights_bytes", "cache_bytes", "state_bytes")]
        rows.append([kind, *cells, *("-" if peak is None else f"{peak / 1e9:.3f} GB" for peak in peaks)])
    counts = [name for name in next(iter(section.values())) if name.endswith(" loops")]
    return (
        f"### {settings['long_rows']:,} tokens\n\nThe 1.4B shape with int4 weights and quantized caches, from loading "
        "to the last token that fits. In float16 the paper (arXiv 2605.07721) counts 9.49 GB for MELT-1.6B at 32,000 "
        f"tokens, 27.97 for Ouro-1.4B and {_PLAIN_GB} for Qwen3-1.7B.\n\n"
        + table(
            [
                "cache",
                "weights",
                "keys and values",
                "all state",
                *(f"peak, {name}".replace(" 1 loops", " 1 loop") for name in counts),
            ],
            rows,
        )
        + "\n![Memory against loops.](memory.png)\n"
    )


def _rival(name: str) -> tuple[str, str]:
    """Return a rival's name in a table and its threads: "melt, 2 threads" -> ("MELT, one loop", "2")."""
    rival, _, threads = name.partition(", ")
    return "MELT, one loop" if rival == "melt" else rival, threads.partition(" ")[0] or "default"


def _smollm2(section: Row, settings: Row) -> str:
    if not section.get("turns"):
        return f"### SmolLM2-135M\n\nNot measured: {section['skipped']}.\n"
    rows, best = [], []
    turns = {"0": section["turns"], **section.get("beside", {})}
    for busy, context, found in ((busy, *pair) for busy, each in turns.items() for pair in each.items()):
        fastest: dict[str, tuple[float, str]] = {}
        for name, one in found.items():
            rival, threads = _rival(name)
            seconds = one["token_s"]["median"]
            fastest[rival] = min(fastest.get(rival, (seconds, threads)), (seconds, threads))
            rows.append(
                [
                    rival,
                    threads,
                    busy,
                    context,
                    middle(one["token_s"], 1e-3),
                    f"{1 / seconds:.1f}",
                    middle(one["time_against_first"]),
                    f"{settings['prompt'] / one['prefill_s']['median']:.0f}",
                ]
            )
        each = (f"{rival} {1 / seconds:.1f} tokens/s ({threads})" for rival, (seconds, threads) in fastest.items())
        beside = "" if busy == "0" else f", beside {plural(int(busy), 'busy process', 'es')}"
        best.append(f"- {context} tokens in the cache{beside}: {', '.join(each)}\n")
    overhead = max(row["overhead_share"]["median"] for row in section["bench"]["results"])
    skipped = "".join(f"\n{name} was left out: {reason}.\n" for name, reason in section.get("skipped", {}).items())
    head = [
        "",
        "threads",
        "busy processes",
        "tokens in the cache",
        "ms per token",
        "tokens/s",
        "time relative to the first",
        "prefill, tokens/s",
    ]
    given, each = "", ""
    if "genai" in section:
        given, each = f" (`{section['genai']['builder']}`)", ", each with every number of threads"
    return (
        "### SmolLM2-135M\n\nReal weights as a MELT at one loop, against onnxruntime-genai on its own builder's int4 "
        f"export{given} of the same weights{each}; a prompt of {settings['prompt']} tokens.\n\n"
        + table(head, rows)
        + "\nEach with its fastest number of threads, in brackets:\n\n"
        + "".join(best)
        + f"\nTime outside the graphs is at most {overhead:.1%} per token.\n"
        + skipped
    )


_TITLES = {
    "decode": "decoding at the 1.4B shape",
    "smollm2": "SmolLM2-135M",
    "buffer": "the large buffer",
    "loops": "more loops",
    "long": "the long cache",
}
_PARTS = {"decode": _decode, "smollm2": _smollm2, "buffer": _buffer, "loops": _loops, "long": _long}


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
