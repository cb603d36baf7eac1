"""The section "speed" of pipelined.py: tokens/s at the 1.4B shape, plain and pipelined in turn, and a run's cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from common import melt_export
from melt_models import LoopLMConfig
from melt_runtime import LoopSettings, Runtime
from melt_runtime.backends.lanes import Lane, make_lanes
from melt_runtime.bench.busy import BusyProcesses
from melt_runtime.bench.stopwatch import Stopwatch, settle
from melt_runtime.bench.sweep import spread
from melt_runtime.decoding.loop_driver import LoopDriver
from melt_runtime.decoding.pipeline import PipelineCounts, Pipelining
from melt_runtime.progress import Step
from numpy.typing import NDArray
from random_checkpoint import LOOPLM_SHAPES, make, resized

_EXPORT = ("--weights", "int4", "--method", "rtn")


class ReplayedDrafts:
    """Drafts as good as a trained model's.

    Whether the loops predict a token rightly is what they did for one of the trained model's tokens, drawn at random.
    ``known``: the tokens of plain decoding. ``opinions``: how many tokens were predicted rightly ("1") or not ("0") by
    the loops before the last, such as {"011": 216}.
    """

    def __init__(self, driver: LoopDriver, known: Sequence[int], opinions: Mapping[str, int], seed: int):
        self.driver, self.known = driver, known
        self.place = 0  # of the token that was fed last, in ``known``
        counts = np.array(list(opinions.values()), np.float64)
        drawn = np.random.default_rng(seed).choice(len(counts), len(known), p=counts / counts.sum())
        self._patterns = [list(opinions)[one] for one in drawn]

    def __call__(self, logits: NDArray[np.float32], ahead: Sequence[int]) -> int | None:
        """Predict the token after those of ``ahead``, in the time that looking at the logits takes."""
        logits.argmax()
        place = self.place + 1 + len(ahead)
        if place >= len(self.known):
            return None
        right = self.known[place]
        assert self.driver.pipeline is not None
        loop = self.driver.pipeline.ran(0)[len(ahead)]
        if list(ahead) == list(self.known[self.place + 1 : place]) and self._patterns[place][loop - 1] == "1":
            return right
        return (right + 1) % len(logits)


class Turns:
    """A driver that decodes the same tokens again and again after ``context`` others, plainly or pipelined."""

    def __init__(self, driver: LoopDriver, context: int, count: int, opinions: Mapping[str, int]):
        self.driver, self.context, self.opinions = driver, context, opinions
        self.settings = LoopSettings(driver.manifest.loops)
        self.known = [0]
        self.differing = self.runs = self.tokens = self.rows = 0
        for _ in range(count):
            self.known.append(self._plain_token(self.known[-1], len(self.known) == 1))

    def plain(self) -> float:
        """Return the seconds per token of plain decoding."""
        started = perf_counter()
        for place, token in enumerate(self.known[:-1]):
            self._plain_token(token, place == 0)
        return (perf_counter() - started) / (len(self.known) - 1)

    def pipelined(self, seed: int) -> float:
        """Return the seconds per token of pipelined decoding. Counts runs, and tokens that differ from plain ones."""
        driver, drafts = self.driver, ReplayedDrafts(self.driver, self.known, self.opinions, seed)
        assert driver.pipeline is not None
        counts, pipelining = PipelineCounts(driver.pipeline.lanes.window), Pipelining(drafts)
        self._begin()
        driver.pipeline.begin(0, counts)
        found = []
        started = perf_counter()
        for place, token in enumerate(self.known[:-1]):
            drafts.place = place
            found.append(int(driver.advance([[token]], self.settings, pipelining=pipelining).row(0).argmax()))
        seconds = (perf_counter() - started) / len(found)
        self.differing += sum(one != other for one, other in zip(found, self.known[1:], strict=True))
        self.runs, self.tokens, self.rows = (
            self.runs + counts.runs,
            self.tokens + counts.tokens,
            self.rows + counts.rows,
        )
        return seconds

    def _plain_token(self, token: int, first: bool) -> int:
        if first:
            self._begin()
        return int(self.driver.advance([[token]], self.settings).row(0).argmax())

    def _begin(self) -> None:
        """Set the number of cached tokens without running them; the cache's contents do not affect times."""
        self.driver.assume(0, self.context, self.settings.loops)


def speed(directory: Path, settings: Any, step: Step, report: dict[str, Any]) -> dict[str, Any]:
    """Time plain and pipelined decoding in turn, for every number of threads and busy processes and every context."""
    opinions = report["trained"]["opinions"]
    packages = {cache: _package(directory, settings, cache, step) for cache in settings.caches}
    results, costs = [], []
    total = len(packages) * len(settings.thread_counts) * len(settings.busy) * (len(settings.contexts) + 1)
    for (cache, package), threads in product(packages.items(), settings.thread_counts):
        runtime = Runtime.load(package, threads=threads, check_hashes=False)
        for busy in settings.busy:
            about = {"cache": cache, "threads": threads, "busy": busy}
            with BusyProcesses(busy):
                for context in settings.contexts:
                    driver = runtime.driver()
                    if busy:
                        settle([Stopwatch(driver)], context)
                    turns = Turns(driver, context, settings.tokens, opinions)
                    results.append({**about, "context": context, **in_turn(turns, settings.rounds)})
                    step("plain and pipelined in turn", total, 1)
                costs.append({**about, "rows": run_costs(runtime, settings.contexts[0], settings.rounds)})
                step("plain and pipelined in turn", total, 1)
    return {"results": results, "costs": costs}


def in_turn(turns: Turns, rounds: int) -> dict[str, Any]:
    """Decode plainly and pipelined by turns; the first round does not count."""
    plain, piped = [], []
    for turn in range(rounds + 1):
        both = turns.plain(), turns.pipelined(turn)
        if turn:
            plain.append(both[0])
            piped.append(both[1])
    return {
        "plain_tokens_s": spread(1 / np.array(plain)),
        "pipelined_tokens_s": spread(1 / np.array(piped)),
        "times_as_fast": spread(np.array(plain) / np.array(piped)),
        "runs_per_token": turns.runs / turns.tokens,
        "rows_per_run": turns.rows / turns.runs,
        "tokens": turns.tokens,
        "differing": turns.differing,
    }


def run_costs(runtime: Runtime, context: int, rounds: int) -> list[dict[str, Any]]:
    """Time a run of the loop step, with embedding and head, over 1 to all loops of one sequence, then of two."""
    loops, found = runtime.manifest.loops, list[tuple[int, list[float]]]()
    for slots in (1, 2):
        lanes, lengths = make_lanes(runtime.driver(slots).state), np.full(slots, context)
        each: dict[int, list[float]] = {rows: [] for rows in (range(1, loops + 1) if slots == 1 else (loops,))}
        for turn in range(rounds + 1):
            for rows, times in each.items():
                tokens = [[Lane(0, ran) for ran in reversed(range(rows))]] * slots
                for _ in range(3):
                    started = perf_counter()
                    lanes.run(tokens, lengths)
                    if turn:
                        times.append(perf_counter() - started)
        found += [(rows * slots, times) for rows, times in each.items()]
    alone = float(np.median(found[0][1]))
    return [
        {"rows": rows, "seconds": spread(times), "times_one": float(np.median(times)) / alone} for rows, times in found
    ]


def _package(directory: Path, settings: Any, cache: str, step: Step) -> Path:
    """Make the package of the 1.4B shape with random weights, and a cache of this type, unless it exists."""
    name = f"looplm-{settings.layers}-{settings.hidden}-int4"
    package = directory / (name if cache == "fp32" else f"{name}-{cache}-cache")
    if not package.is_dir():
        step("making the package", 0, 0)
        shape = resized(
            LOOPLM_SHAPES["ouro-1.4b"],
            layers=settings.layers,
            hidden=settings.hidden,
            vocabulary=settings.vocabulary,
            loops=settings.loops,
        )
        checkpoint = directory / f"{name}-checkpoint"
        if not checkpoint.is_dir():
            make(checkpoint, LoopLMConfig(**shape))
        rows = max(settings.contexts) + settings.tokens + 8
        stored = () if cache == "fp32" else ("--cache", cache)
        melt_export(checkpoint, package, rows, *_EXPORT, *stored, "--max-batch", "2")
    return package
