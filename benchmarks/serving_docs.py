"""Writes the measured tables of docs/benchmarks.json into docs/serving.md; its other text is written by hand.

    python benchmarks/serving_docs.py

The figures of batching.py stand between ``<!-- batching -->`` and ``<!-- /batching -->``, those of soak.py between
``<!-- soak -->`` and ``<!-- /soak -->``; without figures, the command that measures them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from common import clock, console_block, facts, human, plural, table
from write_docs import DOCS, batching_part

Row = dict[str, Any]


def batching(section: Row) -> str:
    """Return the tables on throughput and delay, without their heading."""
    return batching_part(section).partition("\n\n")[2]


def soak(section: Row) -> str:
    """Return the table of a soak."""
    settings, kept = section["settings"], section["memory"]
    asked = sum(section["requests"].values())
    kinds = ", ".join(f"{count:,} {name}" for name, count in section["requests"].items())
    latency = [
        [name, f"{row['p50'] * 1e3:.1f}", f"{row['p99'] * 1e3:.1f}", f"{row['count']:,}"]
        for name, row in (
            ("first token of a stream", section["first_token"]),
            ("whole stream", section["stream"]),
            ("answer in one piece", section["whole"]),
        )
    ]
    attacks, honest = section.get("attacks", {}), section.get("honest", {})
    latency += [
        [f"{name}, while {sum(attacks.values()):,} attacks came", "", f"{honest[key]['attacked'] * 1e3:.1f}", ""]
        for name, key in (("first token", "first_token"), ("whole stream", "stream"), ("in one piece", "whole"))
        if attacks
    ]
    totals = [
        ["requests", f"{asked:,}"],
        ["failed", f"{section['errors']:,}"],
        ["tokens", f"{section['tokens']:,}"],
        ["time", clock(section["seconds"])],
        ["state", f"{section['state_bytes']:,} bytes"],
        ["resident memory, second quarter of the time", human(kept["settled_bytes"])],
        ["resident memory, last quarter", f"{human(kept['last_bytes'])} ({kept['grown_bytes'] / 1e6:+.2f} MB)"],
    ]
    return (
        f"{plural(settings['clients'], 'client')} without a pause, {plural(settings['slots'], 'slot')}, "
        f"{plural(settings['threads'], 'thread')} for the server: {kinds}.\n\n"
        + console_block(section["command"])
        + f"\n{facts(section)}\n"
        + table(["", "measured"], totals)
        + (f"\nAttacks: {', '.join(f'{count:,} {name}' for name, count in attacks.items())}.\n" if attacks else "")
        + f"\nClients' waiting times in ms. Answers have 1 to {settings['longest']} tokens, and "
        f"{plural(max(settings['clients'] - settings['slots'], 0), 'client')} at a time wait for a slot.\n\n"
        + table(["", "p50", "p99", "answers"], latency)
    )


SECTIONS: dict[str, Callable[[Row], str]] = {"batching": batching, "soak": soak}


def filled(document: str, content: Row) -> str:
    """Fill the tables into the document. Raises ValueError where a pair of marks is missing."""
    for name, part in SECTIONS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if document.count(begin) != 1 or document.count(end) != 1:
            raise ValueError(f"the document must have {begin} and {end} once each")
        missing = f"Not measured yet:\n\n{console_block(f'python benchmarks/{name}.py --json docs/benchmarks.json')}"
        text = part(content[name]) if name in content else missing
        inside = f"{begin}\n\n{text.strip()}\n\n{end}"
        document = re.sub(f"{begin}.*{end}", lambda _, inside=inside: inside, document, flags=re.DOTALL)  # type: ignore[misc]
    return document


def main(
    directory: Annotated[Path, typer.Option("--docs", help="Directory of benchmarks.json and serving.md.")] = DOCS,
) -> None:
    """Write the tables of serving.md from benchmarks.json."""
    content = json.loads((directory / "benchmarks.json").read_text(encoding="utf-8"))
    path = directory / "serving.md"
    path.write_text(filled(path.read_text(encoding="utf-8"), content), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
