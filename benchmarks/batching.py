"""What continuous batching gives and costs: tokens a second by slots, and a stream's rhythm beside a prompt.

    python benchmarks/batching.py [--json FILE] [--quick] [--package DIR]

Exports a package of its own (random weights in the Ouro-1.4B shape, cut to a few layers) into a temporary directory, or
takes one that is there, and measures it through the scheduler. Two questions:

- throughput: how many tokens a second do 1, 2, 4 and 8 streams draw together?
- delay: how long does a running stream wait for its next token while a prompt of 8 chunks is prefilled beside it?

Configurations are visited in turn, so that a slow moment of the machine disturbs all alike. ``write_docs.py`` turns the
JSON file into docs/benchmarks.md.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import typer
from common import command_line, loaded_machine, random_package, save, versions
from loop_step import in_child
from melt_runtime import Request, Runtime, Scheduler, TextDelta
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

SLOTS = (1, 2, 4, 8)
PROMPT_CHUNKS = 8
_LIBRARIES = ("melt-export", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Settings:
    """What is run. ``rows``: of each slot's cache; ``chunk``: tokens prefilled together (of a package of our own);
    ``tokens``: drawn by each stream; ``rounds``: visits to each configuration."""

    shape: str = "ouro-1.4b"
    layers: int = 2
    rows: int = 2048
    chunk: int = 128
    loops: int = 4
    tokens: int = 64
    rounds: int = 20
    threads: int = 2


QUICK = {"layers": 1, "rows": 256, "chunk": 16, "loops": 2, "tokens": 12, "rounds": 2}


class Times:
    """A listener that notes when each delta came."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, event: Any) -> None:
        if isinstance(event, TextDelta):
            self.at.append(perf_counter())


def request(runtime: Runtime, settings: Settings, prompt: int, tokens: int) -> Request:
    """A request that draws so many tokens after a prompt of so many, whatever they are."""
    options = runtime.options(max_tokens=tokens, loops=settings.loops, exit_threshold=1.0, ignore_eos=True)
    ids = np.arange(prompt) % (runtime.manifest.vocab_size - 1)
    return Request(tuple(ids.tolist()), options)


def throughput(scheduler: Scheduler, settings: Settings, slots: int) -> float:
    """Tokens a second of so many streams together, while all of them stream."""
    streams = [Times() for _ in range(slots)]
    asked = request(scheduler.runtime, settings, 8, settings.tokens)
    for handle in [scheduler.submit(asked, times) for times in streams]:
        handle.result()
    begin, end = max(times.at[0] for times in streams), min(times.at[-1] for times in streams)
    return sum(begin < at <= end for times in streams for at in times.at) / (end - begin)


def delays(scheduler: Scheduler, settings: Settings) -> dict[str, list[float]]:
    """Seconds between a stream's tokens: "alone", and "beside" a prompt of eight chunks while it is prefilled."""
    runtime = scheduler.runtime
    chunk = runtime.manifest.chunk
    stream, newcomer = Times(), Times()
    room = runtime.manifest.max_seq_len - 8
    running = scheduler.submit(request(runtime, settings, 8, room), stream)
    deltas = iter(running)
    for _ in range(settings.tokens):
        next(deltas)
    length = min(PROMPT_CHUNKS * chunk, runtime.manifest.max_seq_len)
    submitted = perf_counter()
    scheduler.submit(request(runtime, settings, length, 1), newcomer).result()
    for _ in range(2):
        next(deltas, None)
    running.cancel()
    for _ in deltas:
        pass
    gaps = [(at, at - before) for before, at in zip(stream.at, stream.at[1:], strict=False)]
    return {
        "alone": [gap for at, gap in gaps if at <= submitted][1:],
        "beside": [gap for at, gap in gaps if at - gap >= submitted and at - gap <= newcomer.at[0]],
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles, 99th percentile and number of some values."""
    low, median, high, last = np.percentile(values, (25, 50, 75, 99)).tolist()
    return {"median": median, "low": low, "high": high, "p99": last, "count": len(values)}


def measure(package: Path, settings: Settings, advance: Any) -> dict[str, Any]:
    """Both measurements."""
    runtime = Runtime.load(package, backend="onnxruntime", threads=settings.threads, check_hashes=False)
    rates: dict[int, list[float]] = {slots: [] for slots in SLOTS}
    gaps: dict[str, list[float]] = {"alone": [], "beside": []}
    with ExitStack() as stack:
        schedulers = {slots: stack.enter_context(Scheduler(runtime, slots)) for slots in SLOTS}
        for turn in range(settings.rounds + 1):  # the first is a warm-up
            for slots, scheduler in schedulers.items():
                rate = throughput(scheduler, settings, slots)
                if turn:
                    rates[slots].append(rate)
            found = delays(schedulers[2], settings)
            for name, values in found.items():
                gaps[name] += values if turn else []
            advance()
    return {
        "throughput": [{"slots": slots, **spread(values)} for slots, values in rates.items()],
        "delay": {name: spread(values) for name, values in gaps.items()},
        "chunk": runtime.manifest.chunk,
        "prompt": min(PROMPT_CHUNKS * runtime.manifest.chunk, runtime.manifest.max_seq_len),
    }


def run(settings: Settings, package: Path | None, console: Console) -> dict[str, Any]:
    """The section of the JSON file."""
    report: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": loaded_machine(),
        "versions": versions(*_LIBRARIES),
        "settings": asdict(settings),
        "package": None if package is None else package.name,
    }
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as display, tempfile.TemporaryDirectory(prefix="melt-batching-") as name:
        if package is None:
            task = display.add_task("exporting", total=3)
            shape = {"num_hidden_layers": settings.layers, "chunk_size": settings.chunk}
            sizes = {"max_seq_len": settings.rows, "max_batch": max(SLOTS)}
            for line in in_child(random_package, Path(name), shape, sizes, settings.shape):
                display.update(task, description=line, advance=1)
            package = Path(name) / "package"
        task = display.add_task("measuring", total=settings.rounds + 1)
        return report | measure(package, settings, lambda: display.advance(task))


def show(report: dict[str, Any], console: Console) -> None:
    """The results as tables."""
    table = Table("slots", "tokens/s, all streams", "quartiles", "a stream")
    for row in report["throughput"]:
        each = row["median"] / row["slots"]
        table.add_row(
            f"{row['slots']}", f"{row['median']:.1f}", f"{row['low']:.1f} to {row['high']:.1f}", f"{each:.1f}"
        )
    console.print(table)
    table = Table("a stream's next token", "median", "99th percentile", "tokens")
    for name, row in report["delay"].items():
        table.add_row(name, f"{row['median'] * 1e3:.1f} ms", f"{row['p99'] * 1e3:.1f} ms", f"{row['count']}")
    console.print(table)


def main(
    package: Annotated[Path | None, typer.Option(help="Measure this package instead of one of our own.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the section 'batching' of this JSON file.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One minute, to see that it works; not for figures.")] = False,
    rounds: Annotated[int | None, typer.Option(help="Visits to each configuration.", min=1)] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that each stream draws a visit.", min=2)] = None,
    threads: Annotated[int, typer.Option(help="Threads of ONNX Runtime.", min=1)] = Settings.threads,
) -> None:
    """Measure continuous batching."""
    changes: dict[str, Any] = {**(QUICK if quick else {}), "threads": threads}
    changes |= {name: value for name, value in (("rounds", rounds), ("tokens", tokens)) if value is not None}
    report = run(Settings(**changes), package, Console(stderr=True))
    report["command"] = command_line("batching.py", sys.argv[1:])
    show(report, Console())
    if json_file is not None:
        save(json_file, "batching", report)


if __name__ == "__main__":
    typer.run(main)
