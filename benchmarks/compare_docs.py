"""Values of the template comparison.md.j2, from the section "comparison", which compare.py writes."""

from __future__ import annotations

from typing import Any

from common import plural
from compare_plots import OURS, PLAIN_GB, label, named, smollm2_turns
from templating import render

Row = dict[str, Any]


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
        label=label,
        eager=_eager(decode) if decode else [],
        threads=_threads(decode) if decode else [],
        plain_gb=PLAIN_GB,
    )


def _eager(decode: Row) -> list[Row]:
    """Pair PyTorch's figures with each package's, by precision and context."""
    rows = []
    for name, found in decode["eager"].items():
        precision, context = name.split("/")
        (_, theirs), *packages = found.items()
        for package, ours in packages:
            times = _inverse(ours["time_against_first"])
            row = {"precision": precision, "context": context, "package": label(package)}
            rows.append({**row, "theirs": theirs, "ours": ours, "times_as_long": times})
    return rows


def _threads(decode: Row) -> list[str]:
    """Say how many threads each rival had, if several were tried."""
    return [
        f"{name.replace('eager', 'PyTorch') if 'eager' in name else label(name)}: {found['threads']}"
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


def _smollm2(section: Row) -> Row:
    """List what each rival reached, by busy processes and context, each one's fastest way and ours against theirs."""
    prompts = section.get("prompts", {})
    names = list(dict.fromkeys(named(name)["rival"] for *_, found in smollm2_turns(section) for name in found))
    turns, best = [], []
    for busy, context, found in smollm2_turns(section):
        rows = [{**one, **named(name)} for name, one in found.items()]
        prompt = prompts.get(context)
        turns.append({"busy": busy, "context": context, "prompt": prompt, "rows": rows})
        measures = [("token_s", 1, f"decoding, {context} tokens in the cache")]
        measures += [("prefill_s", prompt, f"prefill of {prompt} tokens")] if prompt else []
        best += [{"busy": busy, "measure": title, **_best(rows, names, key, count)} for key, count, title in measures]
    return {
        "turns": turns,
        "names": names,
        "best": best,
        "rivals": {
            named(name)["rival"]: about | {"loss": section.get("losses", {}).get(name)}
            for name, about in section.get("rivals", {}).items()
        },
        "bench": section["bench"],
    }


def _best(rows: list[Row], names: list[str], measure: str, tokens: int) -> Row:
    """Return each rival's most tokens/s and how it ran, and our speed against the fastest of the others."""
    fastest: dict[str, tuple[float, str]] = {}
    for row in rows:
        mine = (tokens / row[measure]["median"], row["how"])
        fastest[row["rival"]] = max(fastest.get(row["rival"], mine), mine)
    shown = [f"{fastest[name][0]:,.0f} ({fastest[name][1]})" if name in fastest else "-" for name in names]
    others = [speed for name, (speed, _) in fastest.items() if name != OURS]
    return {"fastest": shown, "against": fastest[OURS][0] / max(others) if others and OURS in fastest else None}


_TITLES = {
    "decode": "decoding at the 1.4B shape",
    "smollm2": "SmolLM2-135M",
    "buffer": "the large buffer",
    "loops": "more loops",
    "long": "the long cache",
}
