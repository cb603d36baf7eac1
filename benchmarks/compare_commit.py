"""Compares this code's decoding at the 1.4B shape with another commit's: each its own package, and its own runtime.

    python benchmarks/compare_commit.py COMMIT [--layers 24] [--packages DIR] [--json FILE]

Both packages are of one checkpoint with random weights, int4, rounded to nearest, and run with the libraries of this
environment. They take turns, quiet and beside a busy process. The commit's source is unpacked from git into
``--packages``, where the next run finds it with its package; this code's package is made anew.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from common import command_line, loaded_machine, save, versions
from compare_settings import QUICK, Settings, checkpoint, counting
from melt_runtime.progress import Step, shown_progress
from rich.console import Console
from rivals.other_tree import ROOT, TreeRival, changed, commit_of, export, extract
from rivals.turns import take_turns

_ROWS = 1024


def compare(directory: Path, commit: str, settings: Settings, context: int, step: Step) -> dict[str, Any]:
    """Export with both and let them take turns. ``context``: tokens of the prompt. Raises RuntimeError."""
    commit, ours = commit_of(commit), commit_of("HEAD") + (" with changes" if changed() else "")
    step("writing a checkpoint", 0, 0)
    source = checkpoint(directory, settings, "melt")
    rows = str(min(_ROWS, settings.rows))
    trees = {"this code": ROOT, f"commit {commit}": extract(commit, directory / f"source-{commit}")}
    sizes, packages = {}, {}
    for name, tree in trees.items():
        step(f"exporting with {name}", 0, 0)
        packages[name] = directory / ("package-now" if tree is ROOT else f"package-{commit}")
        if tree is ROOT:
            shutil.rmtree(packages[name], ignore_errors=True)
        if not packages[name].is_dir():
            export(tree, source, packages[name], "--max-seq-len", rows, *settings.export)
        sizes[name] = sum(file.stat().st_size for file in packages[name].glob("*.data"))
    turns = {}
    for busy in (0, *settings.busy):
        shared = (settings.threads, settings.loops, context, settings.tokens)
        sides = [TreeRival(name, tree, packages[name], *shared) for name, tree in trees.items()]
        visits = len(sides) * (settings.rounds + 1)
        turns[str(busy)] = take_turns(sides, settings.rounds, counting(step, f"in turn, {busy} busy", visits), busy)
    return {"commit": commit, "this_code": ours, "context": context, "weights_bytes": sizes, "turns": turns}


def main(
    commit: Annotated[str, typer.Argument(help="The other commit, as git names it.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the section 'commit' of this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small shape, to see that it works.")] = False,
    packages: Annotated[Path | None, typer.Option(help="A directory for packages, which are found again.")] = None,
    export_options: Annotated[
        str | None, typer.Option("--export", help="Options of melt-export for both. Default: int4, rounded to nearest.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of the 1.4B shape, which has 24.", min=1)] = 24,
    threads: Annotated[int, typer.Option(help="Threads of both.", min=1)] = 2,
    context: Annotated[int, typer.Option(help="Tokens in the cache before the timed ones.", min=1)] = 10,
    rounds: Annotated[int, typer.Option(help="Turns of each.", min=1)] = 9,
    tokens: Annotated[int, typer.Option(help="Tokens per turn.", min=1)] = 6,
) -> None:
    """Measure decoding beside another commit's."""
    changes: dict[str, Any] = {"layers": layers, "threads": threads, "rounds": rounds, "tokens": tokens}
    changes |= {} if export_options is None else {"export": tuple(shlex.split(export_options))}
    settings = Settings(**{**changes, **QUICK}) if quick else Settings(**changes)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command_line("compare_commit.py", sys.argv[1:]),
        "machine": loaded_machine(),
        "versions": versions("onnxruntime", "torch"),
        "settings": {"layers": settings.layers, "hidden": settings.hidden, "loops": settings.loops}
        | {"threads": settings.threads, "export": " ".join(settings.export)},
    }
    with shown_progress() as step, tempfile.TemporaryDirectory(prefix="melt-commit-") as name:
        directory = (Path(name) if packages is None else packages) / f"commit-{settings.layers}-layers"
        directory.mkdir(parents=True, exist_ok=True)
        try:
            report |= compare(directory, commit, settings, context, step)
        except RuntimeError as error:
            raise SystemExit(f"compare_commit.py: {error}") from error
    if json_file is not None:
        save(json_file, "commit", report)
    Console().print_json(data=report)


if __name__ == "__main__":
    typer.run(main)
