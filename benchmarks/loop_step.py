"""Cost of a loop step: time by buffer size and tokens, memory by loops and generated tokens.

    python benchmarks/loop_step.py [--json FILE] [--quick]

Exports packages (random weights in the Ouro-1.4B shape, cut to a few layers) into a temporary directory and measures
them with the runtime. Three questions:

- time: does a decoding step's time depend on the buffer, or only on the tokens in it?
- loops: do state and resident memory depend on the number of loops?
- long: does resident memory grow while tokens are generated?

``write_docs.py`` writes the JSON file's figures to docs/benchmarks.md. Runs on Linux (it reads /proc).
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import command_line, loaded_machine, resident, save, versions
from melt_runtime import LoopDriver, LoopSettings, Runtime
from melt_runtime.decoding.generator import Generator
from melt_runtime.package.specs import DIALECTS, PRECISIONS
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

# A small vocabulary: a loop step reads neither the embedding nor the head.
VOCABULARY = 1024
PROMPT = [1, 2, 3, 4]
MEMORY_ROWS = 4096
_LIBRARIES = ("melt-export", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    - ``buffers``: tokens that each package's cache can hold; ``tokens``: tokens in it.
    - ``rounds``: visits to each configuration; ``time_loops``: loops per visit, the first of them a warm-up.
    - ``loops``: numbers of loops whose memory is compared over ``loop_tokens`` tokens.
    - ``long_tokens``: tokens of the long generation, with ``long_loops`` loops each; resident memory is read every
      ``long_every`` tokens.
    """

    shape: str = "ouro-1.4b"
    layers: int = 2
    precision: str = "fp32"
    dialect: str = "onnxruntime"
    threads: int = 1
    buffers: tuple[int, ...] = (1024, 4096, 32768)
    tokens: tuple[int, ...] = (100, 1000, 2000, 4000)
    rounds: int = 60
    time_loops: int = 4
    loops: tuple[int, ...] = (1, 4, 16)
    loop_tokens: int = 64
    long_tokens: int = 2000
    long_loops: int = 2
    long_every: int = 100


QUICK = {"layers": 1, "rounds": 4, "loop_tokens": 8, "long_tokens": 100, "long_every": 10}


def in_child(function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
    """Run a generator in a fresh process and yield its values. Raises RuntimeError if the process fails."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send_all, args=(theirs, function, *arguments))
    child.start()
    theirs.close()
    try:
        while True:
            try:
                yield ours.recv()
            except EOFError:
                break
    finally:
        ours.close()
        child.join()
    if child.exitcode:
        raise RuntimeError(f"{function.__name__} failed in its process (exit code {child.exitcode})")


def _send_all(pipe: Connection, function: Callable[..., Iterator[Any]], *arguments: Any) -> None:
    for item in function(*arguments):
        pipe.send(item)
    pipe.close()


def export_packages(directory: Path, settings: Settings, rows: tuple[int, ...]) -> Iterator[str]:
    """Make one checkpoint and export a package for each buffer size, yielding a line before each step."""
    from melt_models import MeltConfig
    from random_checkpoint import SHAPES, make

    from melt_export.export import ExportOptions, building

    shape = {"num_hidden_layers": settings.layers, "vocab_size": VOCABULARY}
    yield "writing a checkpoint"
    make(directory / "checkpoint", MeltConfig(**{**SHAPES[settings.shape].to_dict(), **shape}))
    for size in rows:
        yield f"exporting {size:,} rows"
        options = ExportOptions(settings.precision, settings.dialect, max_seq_len=size, max_batch=1)
        with building(directory / "checkpoint", package_path(directory, size), options):
            pass


def package_path(directory: Path, rows: int) -> Path:
    """Return the directory of the package with a cache of ``rows`` tokens."""
    return directory / f"rows-{rows}"


def step_times(driver: LoopDriver, tokens: int, loops: int) -> list[float]:
    """Return seconds of the loop steps of one decoded token over a cache of ``tokens`` tokens, without the first loop.

    The cache is only declared full: its content does not affect the time.
    """
    driver.assume(0, tokens, loops)
    (chunk,) = driver.chunks([[1]])
    marks = [time.perf_counter() for _ in driver.loops(chunk, LoopSettings(loops))]
    return np.diff(marks).tolist()


def measure_time(directory: Path, settings: Settings, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """Measure each configuration: buffer size, tokens, median and quartiles of a step in microseconds.

    Adds the ratio to the smallest buffer that holds as many tokens: the median over the rounds of the ratio within a
    round.
    """
    drivers = {
        rows: Runtime.load(
            package_path(directory, rows), backend="onnxruntime", threads=settings.threads, check_hashes=False
        ).driver()
        for rows in settings.buffers
    }
    configurations = [(rows, n) for n in settings.tokens for rows in settings.buffers if n < rows]
    found: dict[tuple[int, int], list[list[float]]] = {c: [] for c in configurations}
    for round_ in range(settings.rounds + 1):
        # In the order A B C, then C B A, so that neither a drift of the machine nor the predecessor favours one.
        for rows, tokens in configurations if round_ % 2 else configurations[::-1]:
            times = step_times(drivers[rows], tokens, settings.time_loops)
            if round_:  # round 0 is the warm-up
                found[rows, tokens].append(times)
        tick()
    result = []
    for rows, tokens in configurations:
        first = next(r for r, n in configurations if n == tokens)
        here, base = (np.median(found[r, tokens], axis=1) for r in (rows, first))
        low, middle, high = np.percentile(found[rows, tokens], [25, 50, 75]) * 1e6
        ratio = np.percentile(here / base, [25, 50, 75])
        result.append(
            {
                "rows": rows,
                "tokens": tokens,
                "median_us": round(middle, 1),
                "quartiles_us": [round(low, 1), round(high, 1)],
                "against_rows": first,
                "ratio": round(ratio[1], 4),
                "ratio_quartiles": [round(ratio[0], 4), round(ratio[2], 4)],
                "steps": int(np.size(found[rows, tokens])),
            }
        )
    return result


def _generator(runtime: Runtime, driver: LoopDriver, tokens: int, loops: int) -> Generator:
    options = runtime.options(max_tokens=tokens, loops=loops, exit_threshold=1.0, ignore_eos=True)
    return Generator(driver, [PROMPT], options, None)


def memory_of_loops(package: Path, tokens: int, loops: int, threads: int) -> Iterator[dict[str, int]]:
    """Yield state and resident memory, in bytes, of a process that generates ``tokens`` tokens with ``loops`` loops."""
    runtime = Runtime.load(package, backend="onnxruntime", threads=threads, check_hashes=False)
    loaded = resident("VmRSS")
    driver = runtime.driver()
    written = sum(1 for _ in _generator(runtime, driver, tokens, loops))
    yield {
        "loops": loops,
        "tokens": written,
        "state_bytes": driver.state.state_bytes,
        "loaded_bytes": loaded,
        "peak_bytes": resident("VmHWM"),
        "cache_bytes_a_loop": runtime.manifest.cache_bytes(runtime.manifest.cache_rows),
    }


def memory_of_tokens(package: Path, settings: Settings) -> Iterator[dict[str, int]]:
    """Yield resident memory in bytes after every ``long_every`` tokens of one long generation."""
    runtime = Runtime.load(package, backend="onnxruntime", threads=settings.threads, check_hashes=False)
    deltas = _generator(runtime, runtime.driver(), settings.long_tokens, settings.long_loops)
    for count, _ in enumerate(deltas, start=1):
        if count == 1 or count % settings.long_every == 0:
            yield {"tokens": count, "resident_bytes": resident("VmRSS")}


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Make all three measurements and return the section of the JSON file."""
    report: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": loaded_machine(),
        "versions": versions(*_LIBRARIES),
        "settings": asdict(settings) | {"vocabulary": VOCABULARY, "memory_rows": MEMORY_ROWS},
    }
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # Fresh processes run first, before this process needs memory itself.
    with Progress(*columns, console=console) as display, tempfile.TemporaryDirectory(prefix="melt-bench-") as name:
        directory = Path(name)
        sizes = tuple(sorted({*settings.buffers, MEMORY_ROWS}))
        task = display.add_task("exporting", total=len(sizes) + 1)
        for line in in_child(export_packages, directory, settings, sizes):
            display.update(task, description=line, advance=1)
        package = package_path(directory, MEMORY_ROWS)

        report["loops"] = []
        task = display.add_task("memory against loops", total=sum(settings.loops))
        for loops in settings.loops:
            report["loops"] += in_child(memory_of_loops, package, settings.loop_tokens, loops, settings.threads)
            display.advance(task, loops)

        report["long"] = []
        task = display.add_task("memory against tokens", total=settings.long_tokens)
        for sample in in_child(memory_of_tokens, package, settings):
            report["long"].append(sample)
            display.update(task, completed=sample["tokens"])

        task = display.add_task("time of a loop step", total=settings.rounds + 1)
        report["time"] = measure_time(directory, settings, lambda: display.advance(task))
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """Print the results as tables."""
    table = Table("tokens in the cache", "size of the buffer", "median", "quartiles", "against", title="One loop step")
    for row in report["time"]:
        low, high = row["quartiles_us"]
        table.add_row(
            f"{row['tokens']:,}",
            f"{row['rows']:,}",
            f"{row['median_us']:,.0f} µs",
            f"{low:,.0f} to {high:,.0f} µs",
            f"{row['ratio']:.3f} x {row['against_rows']:,} rows",
        )
    console.print(table)
    table = Table("loops", "state, bytes", "peak resident, bytes", title=f"{report['loops'][0]['tokens']} tokens")
    for row in report["loops"]:
        table.add_row(f"{row['loops']}", f"{row['state_bytes']:,}", f"{row['peak_bytes']:,}")
    console.print(table)
    first, last = report["long"][1], report["long"][-1]
    console.print(
        f"resident memory: {first['resident_bytes']:,} bytes after {first['tokens']:,} tokens, "
        f"{last['resident_bytes']:,} after {last['tokens']:,}"
    )


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the section 'loop_step' of this JSON file.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One minute, to see that it works; not for figures.")] = False,
    layers: Annotated[int | None, typer.Option(help="Layers of the slice. Default 2, with --quick 1.", min=1)] = None,
    dialect: Annotated[str, typer.Option(help=f"One of {', '.join(DIALECTS)}.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="fp32 or fp16.")] = "fp32",
    rounds: Annotated[int | None, typer.Option(help="Visits to each configuration.", min=1)] = None,
    threads: Annotated[
        int, typer.Option(help="Threads of ONNX Runtime; one disturbs and is disturbed least.", min=1)
    ] = 1,
) -> None:
    """Measure the time of a loop step and the memory of a batch."""
    if dialect not in DIALECTS:
        raise typer.BadParameter(f"{dialect} is not one of {', '.join(DIALECTS)}")
    if precision not in PRECISIONS or precision == "bf16":
        raise typer.BadParameter(f"{precision} is not fp32 or fp16")
    changes: dict[str, Any] = dict(QUICK) if quick else {}
    changes |= {"dialect": dialect, "precision": precision, "threads": threads}
    changes |= {name: value for name, value in (("layers", layers), ("rounds", rounds)) if value is not None}
    report = run(Settings(**changes), Console(stderr=True))
    report["command"] = command_line("loop_step.py", sys.argv[1:])
    show(report, Console())
    if json_file is not None:
        save(json_file, "loop_step", report)


if __name__ == "__main__":
    typer.run(main)
