"""Measures pipelined decoding: whether its tokens are those of plain decoding, runs per token, tokens/s.

    python benchmarks/pipelined.py [SECTION ...] --teacher CHECKPOINT [--json FILE] [--packages DIR] [--quick]

Sections, all by default:

- identity: greedy tokens of random models (grouped heads or not, 2 to 8 loops; precisions, weights, caches) against
  those of plain decoding. Where they differ, the gap between both tokens' logits against the arithmetic's noise.
- trained: held-out additions of a trained LoopLM, greedy and sampled: the same tokens, runs per token, which loops'
  drafts hold. The checkpoint is that of ``melt-train teacher --config examples/addition.yaml`` (10 minutes).
- melt: the same with the MELT of examples/addition-melt, whose tokens are staggered and may differ.
- adaptive: that MELT where tokens leave the loops early, by several criteria, one after the other and pipelined.
- speed: tokens/s at the 1.4B shape, plain and pipelined in turn in one process, with drafts as good as those of
  "trained"; and what a run of several tokens costs. With 8 layers it takes a quarter of an hour on two cores, after
  making its package, which ``--packages`` keeps.

A run of some sections keeps the file's other sections.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from common import command_line, loaded_machine, save, versions
from melt_runtime.progress import Step, shown_progress
from pipelined_adaptive import adaptive
from pipelined_speed import speed
from pipelined_tokens import identity, staggered, trained
from rich.console import Console


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    - ``identity_tokens``: tokens of all random models together; ``identity_loops``: their loops.
    - ``teacher``: a trained LoopLM for addition; ``problems``: how many it answers.
    - ``layers``, ``hidden``, ``vocabulary``, ``loops``: the measured shape; ``contexts``: tokens in its cache;
      ``caches``: what keys and values are stored in.
    - ``threads``: the most; ``busy``: numbers of busy processes beside it; ``rounds``: turns of each way to decode;
      ``tokens``: per turn.
    """

    identity_tokens: int = 10_000
    identity_loops: tuple[int, ...] = (2, 3, 4, 8)
    teacher: Path | None = None
    problems: int = 200
    layers: int = 8
    hidden: int = 2048
    vocabulary: int = 49152
    loops: int = 4
    contexts: tuple[int, ...] = (10, 512)
    caches: tuple[str, ...] = ("fp32", "int8")
    threads: int = 2
    busy: tuple[int, ...] = (0, 1)
    rounds: int = 7
    tokens: int = 24

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """Numbers of threads to try: 1, 2, 4 and so on up to ``threads``."""
        powers = {2**exponent for exponent in range(self.threads.bit_length())}
        return tuple(sorted({*powers, self.threads}))


QUICK: dict[str, Any] = {
    "identity_tokens": 60,
    "identity_loops": (2,),
    "problems": 3,
    "layers": 1,
    "hidden": 128,
    "vocabulary": 512,
    "contexts": (10,),
    "caches": ("fp32",),
    "threads": 1,
    "busy": (0,),
    "rounds": 1,
    "tokens": 6,
}
Measure = Callable[[Path, Any, Step, dict[str, Any]], dict[str, Any]]
SECTIONS: dict[str, Measure] = {
    "identity": identity,
    "trained": trained,
    "melt": staggered,
    "adaptive": adaptive,
    "speed": speed,
}


def run(chosen: list[str], settings: Settings, directory: Path, step: Step, report: dict[str, Any]) -> None:
    """Measure sections into a report, which may hold earlier ones; each is kept if a later one fails."""
    for name in chosen:
        report[name] = SECTIONS[name](directory, settings, step, report)


def about(settings: Settings) -> dict[str, Any]:
    """Return what belongs to every section: date, command, machine, versions, settings."""
    shown = {**asdict(settings), "teacher": settings.teacher and settings.teacher.name}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command_line("pipelined.py", sys.argv[1:]),
        "machine": loaded_machine(),
        "versions": versions("melt-export", "onnxruntime", "numpy"),
        "settings": shown,
    }


def main(
    sections: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SECTIONS)}.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the section 'pipelined' of this file.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="A LoopLM that 'melt-train teacher --config examples/addition.yaml' trained.")
    ] = None,
    packages: Annotated[
        Path | None, typer.Option(help="A directory for packages, which are found there the next time.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the 1.4B shape, which has 24.", min=1)] = None,
    rounds: Annotated[int | None, typer.Option(help="Turns of plain and pipelined decoding.", min=1)] = None,
    threads: Annotated[int, typer.Option(help="Most threads; 1, 2, 4 and so on are tried.", min=1)] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it works; not for figures.")] = False,
) -> None:
    """Measure pipelined decoding against plain decoding."""
    chosen = sections or list(SECTIONS)
    unknown = next((name for name in chosen if name not in SECTIONS), None)
    if unknown is not None:
        raise typer.BadParameter(f"{unknown} is not one of {', '.join(SECTIONS)}")
    if "trained" in chosen and teacher is None:
        raise typer.BadParameter("the section 'trained' needs --teacher, a LoopLM trained for addition")
    given = {"layers": layers, "rounds": rounds, "teacher": teacher}
    base = {"threads": threads, **(QUICK if quick else {})}
    settings = Settings(**base | {name: value for name, value in given.items() if value is not None})
    report: dict[str, Any] = {}
    if json_file is not None and json_file.is_file():
        report = json.loads(json_file.read_text(encoding="utf-8")).get("pipelined", {})
    if "speed" in chosen and "trained" not in {*chosen, *report}:
        raise typer.BadParameter("the section 'speed' takes its drafts from 'trained', which has not been measured")
    with tempfile.TemporaryDirectory(prefix="pipelined-") as scratch, shown_progress() as step:
        directory = packages or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        for name in chosen:
            facts = about(settings)
            run([name], settings, directory, step, report)
            report[name] = facts | report[name]
            if json_file is not None:
                save(json_file, "pipelined", report)
    Console().print_json(data={name: report[name] for name in chosen})


if __name__ == "__main__":
    typer.run(main)
