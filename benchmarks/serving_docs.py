"""Writes the measured tables of docs/benchmarks.json into docs/serving.md; its other text is written by hand.

    python benchmarks/serving_docs.py

The templates batching_figures.md.j2 and soak_figures.md.j2 are filled with the figures of batching.py and soak.py and
stand between ``<!-- batching -->`` and ``<!-- /batching -->``, ``<!-- soak -->`` and ``<!-- /soak -->``. Without
figures, the command that measures them stands there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from common import DOCS
from templating import render

Row = dict[str, Any]
SECTIONS = ("batching", "soak")


def section_text(name: str, content: Row) -> str:
    """Return the tables of a section, or the command that measures it."""
    if name not in content:
        return render("not_measured.md.j2", name=name)
    section = content[name]
    return render(f"{name}_figures.md.j2", section=section, attacks=section.get("attacks", {}))


def filled(document: str, content: Row) -> str:
    """Fill the tables into the document. Raises ValueError where a pair of marks is missing."""
    for name in SECTIONS:
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if document.count(begin) != 1 or document.count(end) != 1:
            raise ValueError(f"the document must have {begin} and {end} once each")
        inside = f"{begin}\n\n{section_text(name, content).strip()}\n\n{end}"
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
