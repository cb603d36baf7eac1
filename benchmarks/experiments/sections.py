"""Building blocks of the sections of docs/experiments.md."""

from __future__ import annotations

from notes import NOTES
from results import Results
from runs import SEEDS, Row

PAPER = "arXiv 2605.07721"
Section = str


def section(title: str, *parts: str, note: str = "", level: int = 2) -> Section:
    """Return a titled section without empty parts, its note last."""
    reason = f"**Why.** {NOTES[note]}\n" if note and NOTES.get(note) else ""
    return "\n".join([f"{'#' * level} {title}\n", *(part for part in (*parts, reason) if part)])


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def picture(name: str, words: str) -> str:
    return f"![{words}]({name})\n"


def few(results: Results, row: Row) -> str:
    """Return a remark for a row with fewer seeds than planned, else nothing."""
    count = len(results.row(row.name))
    return "" if count == len(SEEDS) else f" ({plural(count, 'seed')} of {len(SEEDS)})"
