"""Measure packages in turn with each other, so that other load on the machine affects all alike.

Each token takes generation's path, through the loop driver to the next token: where a backend runs a token as one
graph, that graph is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..decoding.settings import PIPELINE
from ..errors import ArgumentError, BackendError
from ..machine import ReadBandwidth, physical_cores
from ..package.manifest import Manifest
from ..package.onnx_file import initializer_bytes, read_operators
from ..package.reader import Package
from ..package.specs import size_of
from ..progress import Step, no_progress
from ..runtime import Runtime
from ..untrusted import shown, whole_number
from .busy import BusyProcesses, check_count
from .pipelining import decode as decode_from_prompt
from .pipelining import prompt_ids
from .stopwatch import Stopwatch, overhead, settle

_PROMPT = 128  # default tokens of the timed prompt


@dataclass(frozen=True)
class Sweep:
    """The combinations to measure. Raises ArgumentError.

    ``contexts``: tokens in the cache before the timed ones. ``loops``, ``chunks``: empty for each package's own.
    ``busy``: numbers of busy processes beside which everything is measured. ``pipelines``: ways to decode, as in
    ``GenerationOptions``; the timed tokens then follow a prompt that was run. ``prompt``: tokens of the prompt whose
    prefill is timed (0: none; None: 128, or as many as every package holds). ``tokens``: decoded per visit. ``rounds``:
    visits to each combination.
    """

    contexts: tuple[int, ...] = (0,)
    loops: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    chunks: tuple[int, ...] = ()
    threads: tuple[int, ...] = ()
    busy: tuple[int, ...] = (0,)
    pipelines: tuple[str, ...] = ()
    prompt: int | None = None
    tokens: int = 4
    rounds: int = 5

    def __post_init__(self) -> None:
        for name in ("loops", "batches", "chunks", "threads"):
            for value in getattr(self, name):
                whole_number(name, value)
        for name in ("tokens", "rounds"):
            whole_number(name, getattr(self, name))
        if min((self.prompt or 0, *self.contexts)) < 0:
            raise ArgumentError("context and prompt must be 0 or more tokens")
        for count in self.busy:
            check_count(count)
        for way in self.pipelines:
            if way not in PIPELINE:
                raise ArgumentError(f"pipeline is {shown(way)}; it must be one of {', '.join(PIPELINE)}")
        if self.pipelines and self.batches != (1,):
            raise ArgumentError("pipelined decoding is measured with one sequence; leave out batch")
        if not self.contexts or not self.batches or not self.busy:
            raise ArgumentError("name at least one context, one batch and one number of busy processes")


@dataclass(frozen=True)
class Point:
    """One combination. ``loops``, ``chunk``: None for the package's own. ``pipeline``: None to time plain tokens."""

    context: int
    loops: int | None
    batch: int
    chunk: int | None
    busy: int = 0
    pipeline: str | None = None


@dataclass
class Samples:
    """Measurements, one per visit, in seconds: the median of its tokens and of their loops, prefill; bandwidth in
    bytes/s; runs of the loop step per token."""

    token: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    runs: list[float] = field(default_factory=list)

    def add(self, bandwidth: float, token: float, loop: float, prefill: float | None, runs: float) -> None:
        """Add a visit; ``prefill`` is None where none was timed."""
        self.bandwidth.append(bandwidth)
        self.runs.append(runs)
        self.token.append(token)
        self.loop.append(loop)
        self.prefill += [] if prefill is None else [prefill]


def check(manifest: Manifest, name: str, sweep: Sweep) -> None:
    """Raise ArgumentError for a sweep that a package cannot run, before anything is loaded."""
    decoded = 1 + (sweep.tokens if sweep.pipelines else 0)
    longest = max(*(context + decoded for context in sweep.contexts), sweep.prompt or 0)
    if longest > manifest.max_seq_len:
        raise ArgumentError(f"{name} holds {manifest.max_seq_len} tokens; the sweep needs {longest}")
    if max(sweep.batches) > manifest.max_batch:
        raise ArgumentError(f"{name} runs at most {manifest.max_batch} sequences; the sweep asks {max(sweep.batches)}")
    if max(sweep.chunks, default=1) > manifest.chunk:
        raise ArgumentError(f"{name} was exported for a chunk of at most {manifest.chunk}, not {max(sweep.chunks)}")
    for loops in sweep.loops:
        manifest.check_depth(loops, 1.0)


def loop_bytes(package: Package, context: int, batch: int = 1, loops: int | None = None) -> dict[str, int]:
    """Return the bytes that one loop step must move for one token per sequence, as stored.

    These are the weights, the keys and values of ``context`` tokens and the new one, and hidden and latent in and out.
    The mean over ``loops`` loops (None: the package's), because the gate's weights are not read in the first. A CPU
    moves twice the bytes of fp16 weights, because it widens them.
    """
    manifest, graph = package.manifest, package.path("loop_step")
    stored = {name: count for name, count in initializer_bytes(graph).items() if not name.startswith("rotary.")}
    always = {name for node in read_operators(graph) for name in node.inputs}
    later = sum(count for name, count in stored.items() if name not in always)
    swapped = (state for state in manifest.states if state.kind == "swap")
    return {
        "weights": sum(stored.values()) - later // (loops or manifest.loops),
        "cache": manifest.cache_bytes(context + 1, batch) // (manifest.cache_loops or 1),
        "state": sum(2 * size_of(state.shape, state.dtype, batch=batch, chunk=1) for state in swapped),
    }


def peak_memory(package: Path, batch: int, loops: int, threads: int | None) -> dict[str, int | None]:
    """Return the resident bytes of a fresh process that loads a package and decodes: "loaded_bytes", "peak_bytes".

    The values are None if the system does not tell. Raises BackendError if the process fails.
    """
    order = json.dumps({"package": str(package), "batch": batch, "loops": loops, "threads": threads})
    ran = subprocess.run(
        [sys.executable, "-m", "melt_runtime.bench.memory_probe", order], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BackendError(f"measuring the memory of {package.name} failed: {last}")
    found: dict[str, int | None] = json.loads(ran.stdout)
    return found


def bench(packages: Sequence[Path], sweep: Sweep, progress: Step = no_progress) -> dict[str, Any]:
    """Measure packages over a sweep, in turn; the others are compared with the first.

    Returns plain values for JSON. Raises PackageError, BackendError, ArgumentError.
    """
    opened = [Package.open(path, check_hashes=False) for path in packages]
    names = _names(packages)
    if sweep.prompt is None:
        sweep = replace(sweep, prompt=min(_PROMPT, *(package.manifest.max_seq_len for package in opened)))
    for package, name in zip(opened, names, strict=True):
        check(package.manifest, name, sweep)
    report: dict[str, Any] = {"packages": [], "bandwidth": [], "results": []}
    most, batch = max(sweep.loops, default=0), max(sweep.batches)
    for package, name in zip(opened, names, strict=True):
        progress("memory, in a fresh process", len(opened), 1)
        manifest = package.manifest
        report["packages"].append(
            {
                "name": name,
                "model_type": manifest.model.get("model_type"),
                "dialect": manifest.dialect,
                "precision": manifest.precision,
                "state_bytes": manifest.state_bytes(batch),
                **peak_memory(package.directory, batch, most or manifest.loops, (sweep.threads or (None,))[0]),
            }
        )
    for threads in sweep.threads or (None,):
        for section, rows in _with_threads(opened, names, sweep, threads, progress):
            report[section] += rows
    return report


def _names(packages: Sequence[Path]) -> list[str]:
    """Return directory names, numbered where several are alike."""
    plain = [path.resolve().name for path in packages]
    return [name if plain.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(plain, start=1)]


def _with_threads(
    packages: Sequence[Package], names: Sequence[str], sweep: Sweep, threads: int | None, progress: Step
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the report's sections for one number of threads."""
    label = f"{threads or 'default'} threads"
    used = threads or physical_cores()
    progress(f"read bandwidth, {label}", 1, 0)
    bandwidth = ReadBandwidth(used)
    first = bandwidth.measure()
    progress(f"read bandwidth, {label}", 1, 1)
    runtimes = []
    for package in packages:
        progress(f"loading, {label}", len(packages), 1)
        runtimes.append(Runtime.load(package.directory, threads=threads, check_hashes=False))

    depths, chunks, ways = sweep.loops or (None,), sweep.chunks or (None,), sweep.pipelines or (None,)
    choices = product(sweep.contexts, depths, sweep.batches, chunks, sweep.busy, ways)
    points = [Point(*choice) for choice in choices]
    samples = {(at, point): Samples() for at in range(len(packages)) for point in points}
    for batch in sweep.batches:  # one batch's state at a time
        watches = [Stopwatch(runtime.driver(batch)) for runtime in runtimes]
        for turn, busy in product(range(sweep.rounds + 1), sweep.busy):  # the first round is a warm-up
            with BusyProcesses(busy):
                if sweep.busy != (0,):
                    settle(watches, sweep.contexts[0])
                for point in (point for point in points if (point.batch, point.busy) == (batch, busy)):
                    for at, watch in enumerate(watches):
                        rate = bandwidth.measure()
                        timed = point.context == sweep.contexts[0]
                        found = _visit(runtimes[at], watch, point, sweep, prefill=timed)
                        if turn:
                            samples[at, point].add(rate, *found)
                    progress(f"in turn, {label}", len(points) * (sweep.rounds + 1), 1)
        del watches  # before the next batch's state is allocated
    shares: dict[tuple[int, int], list[float]] = {}
    for busy in sweep.busy:
        with BusyProcesses(busy):
            for at, runtime in enumerate(runtimes):
                loops = sweep.loops[0] if sweep.loops else None
                runs = [overhead(runtime, loops=loops) for _ in range(min(sweep.rounds, 3))]
                shares[at, busy] = [share for share in runs if share is not None]
                progress(f"runtime overhead, {label}", len(runtimes) * len(sweep.busy), 1)
    bandwidth.close()
    yield (
        "bandwidth",
        [
            {"threads": used, "busy": busy, "first_bytes_s": first, "bytes_s": spread(_rates(samples, busy))}
            for busy in sweep.busy
        ],
    )
    yield (
        "results",
        [
            _row(packages[at], names, at, point, samples, sweep, used)
            | {"overhead_share": spread(shares[at, point.busy])}
            for point in points
            for at in range(len(packages))
        ],
    )


def _rates(samples: dict[tuple[int, Point], Samples], busy: int) -> list[float]:
    return [rate for (_, point), found in samples.items() if point.busy == busy for rate in found.bandwidth]


def _visit(
    runtime: Runtime, watch: Stopwatch, point: Point, sweep: Sweep, *, prefill: bool
) -> tuple[float, float, float | None, float]:
    """Return the arguments of ``Samples.add`` after the bandwidth."""
    loops = point.loops or watch.driver.manifest.loops
    chunk = point.chunk or watch.driver.manifest.chunk
    if point.pipeline is None:
        token, loop = watch.decode(point.context, loops, sweep.tokens)
        runs = float(loops)
    else:
        prompt = prompt_ids(runtime, point.context + 1)
        token, runs = decode_from_prompt(watch.driver, prompt, loops, sweep.tokens, point.pipeline)
        loop = watch.loop(point.context, loops, sweep.tokens)
    return token, loop, watch.prefill(sweep.prompt, chunk, loops) if prefill and sweep.prompt else None, runs


def _row(
    package: Package,
    names: Sequence[str],
    at: int,
    point: Point,
    samples: dict[tuple[int, Point], Samples],
    sweep: Sweep,
    threads: int,
) -> dict[str, Any]:
    """Return one combination's results for one package. Prefill is timed with the first context only."""
    own, first = samples[at, point], samples[0, point]
    prefill = samples[at, replace(point, context=sweep.contexts[0])].prefill
    quiet = samples.get((at, replace(point, busy=0)))
    plain = samples.get((at, replace(point, pipeline="off")))
    loops = point.loops or package.manifest.loops
    moved = loop_bytes(package, point.context, point.batch, loops)
    total = sum(moved.values())
    token, loop, rate = np.array(own.token), np.array(own.loop), np.array(own.bandwidth)
    return {
        "package": names[at],
        "context": point.context,
        "loops": loops,
        "batch": point.batch,
        "chunk": point.chunk or package.manifest.chunk,
        "threads": threads,
        "busy": point.busy,
        "pipeline": point.pipeline,
        "prompt_tokens": sweep.prompt,
        "first_token_s": spread(prefill),
        "prefill_tokens_s": spread([point.batch * (sweep.prompt or 0) / seconds for seconds in prefill]),
        "decode_tokens_s": spread(point.batch / token),
        "token_ms": spread(1e3 * token),
        "runs_per_token": spread(own.runs),
        "loop_ms": spread(1e3 * loop),
        "bytes_a_loop": {**moved, "total": total},
        "effective_bytes_s": spread(total / loop),
        "bandwidth_share": spread(total / loop / rate),
        "time_against_first": spread(token / np.array(first.token)),
        "time_against_quiet": None if quiet is None else spread(token / np.array(quiet.token)),
        "time_against_plain": None if plain is None else spread(token / np.array(plain.token)),
    }


def spread(values: Any) -> dict[str, float] | None:
    """Return median and quartiles; None without values."""
    if len(values) == 0:
        return None
    low, middle, high = (float(v) for v in np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75)))
    return {"median": middle, "low": low, "high": high}
