"""Trains and measures what docs/adaptive-depth.md shows, from what run.py and text_decoding.py trained, and writes it.

    python benchmarks/experiments/exit_runs.py

Resumable: rows that docs/exits.json has are left alone. About two hours on two cores: half an hour for addition, an
hour for the models of letters, half an hour for text.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from letters import SEEDS as LETTER_SEEDS
from melt_models.atomic import write_text
from runs import SEEDS
from text_runs import SEEDS as TEXT_SEEDS

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent


@dataclass(frozen=True)
class Row:
    """A row of docs/exits.json: its task and name, its checkpoints seed by seed, and how it is measured."""

    task: str
    name: str
    checkpoints: Sequence[Path]
    options: Sequence[str]


def rows(build: Path) -> list[Row]:
    """Return every row, of checkpoints below ``build``."""
    runs, letters, text = build / "experiments", build / "letters", build / "text" / "runs"
    one_by_one = ("--held-out", str(letters / "letters-held-out.bin"), "--prompt", "16", "--written", "48")
    files = sorted((build / "text" / "data").glob("*-held-out.bin"))
    words = (*(part for file in files for part in ("--held-out", str(file))), "--capped", "--written", "48")
    found = []
    for after, stage, sequences in (("", "phase2", "10"), ("-gate", "gate", "24")):
        addition = [runs / f"even{after}-{seed}" / stage for seed in SEEDS]
        found.append(Row("addition", f"even{after}", addition, ()))
        books = [letters / f"letters-{seed}" / stage for seed in LETTER_SEEDS]
        found.append(Row("letters", f"letters{after}", books, (*one_by_one, "--sequences", "64")))
        texts = [text / f"decoding-{seed}" / stage for seed in TEXT_SEEDS]
        found.append(Row("text", f"text{after}", texts, (*words, "--sequences", sequences)))
    return found


def train(build: Path) -> None:
    """Train the exit gates of the addition models, and the models of letters, unless they are there."""
    content: dict[str, Any] = yaml.safe_load((REPOSITORY / "examples" / "addition.yaml").read_text(encoding="utf-8"))
    for seed in SEEDS:
        output, source = build / "experiments" / f"even-gate-{seed}", build / "experiments" / f"even-{seed}" / "phase2"
        output.mkdir(parents=True, exist_ok=True)
        told = {"output": str(output), "seed": seed, "threads": 1, "data": content["data"]}
        told["gate"] = {**content["gate"], "checkpoint": str(source)}
        write_text(output / "run.yaml", yaml.safe_dump(told, sort_keys=False))
        _melt_train(output / "run.yaml")
    letters = build / "letters"
    if not (letters / "letters-held-out.bin").is_file():
        _python("letters.py", "--data", str(build / "text" / "data"), "--root", str(letters))
    for number in LETTER_SEEDS:
        _melt_train(letters / f"letters-{number}" / "run.yaml")


def _melt_train(file: Path) -> None:
    command = [sys.executable, "-m", "melt_models.training.cli", "all", "--config", str(file), "--resume"]
    subprocess.run(command, check=True)


def _python(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


def main(
    build: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("build"),
    docs: Annotated[Path, typer.Option(help="Folder of exits.json; the documents go there.")] = Path("docs"),
) -> None:
    """Train, measure and write what is not there yet."""
    content = json.loads((docs / "exits.json").read_text(encoding="utf-8")) if (docs / "exits.json").is_file() else {}
    missing = [row for row in rows(build) if row.name not in content.get("tasks", {}).get(row.task, {})]
    if missing:
        train(build)
    for row in missing:
        checkpoints = ",".join(map(str, row.checkpoints))
        _python("exits.py", row.task, f"{row.name}={checkpoints}", *row.options, "--output", str(docs / "exits.json"))
    _python("exit_docs.py", "--docs", str(docs))


if __name__ == "__main__":
    typer.run(main)
