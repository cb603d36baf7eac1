"""Rivals that take turns, each in a process of its own: A B A B, so that a noisy machine affects all alike.

A rival is a generator function that loads what it measures and yields a sample, values by name, per turn.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from time import sleep
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
from melt_runtime.bench.busy import BusyProcesses
from melt_runtime.machine import resident

Sample = dict[str, float]
_LIMIT = 600  # seconds that a turn may take, loading included
_PATIENCE = 10  # seconds in which a process may end by itself
_PAUSE = 0.1  # seconds between two turns, in which threads of the last one that wait awake go to sleep


class TakesTurns(Protocol):
    """A rival: what it measured so far, and one more turn."""

    name: str
    samples: list[Sample]

    def visit(self, *, counts: bool) -> None:
        """Take one turn. A sample that does not count is a warm-up. Raises RuntimeError, with the reason."""

    def close(self) -> None:
        """End it."""


class Rival:
    """A generator function in a fresh process, which makes one step per ``visit``.

    ``environment``: variables that its process has besides this one's. Raises RuntimeError, with the reason, when it
    fails.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Iterator[Sample]],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
    ):
        self.name, self.samples = name, list[Sample]()
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs, function, *arguments), daemon=True)
        with patch.dict(os.environ, environment or {}):  # what a process inherits
            self._child.start()
        theirs.close()

    def visit(self, *, counts: bool) -> None:
        """Make one step. A sample that does not count is a warm-up."""
        try:
            self._ours.send(True)
            sample = self._ours.recv() if self._ours.poll(_LIMIT) else f"a turn took over {_LIMIT} seconds"
        except (EOFError, OSError):
            sample = "its process ended"
        if isinstance(sample, str):
            raise RuntimeError(f"{self.name}: {sample}")
        if counts:
            self.samples.append(sample)

    def close(self) -> None:
        """End the process."""
        self._ours.close()
        self._child.join(_PATIENCE)
        if self._child.is_alive():
            self._child.kill()
            self._child.join()


def _serve(pipe: Connection, function: Callable[..., Iterator[Sample]], *arguments: Any) -> None:
    steps: Iterator[Sample] | None = None
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        try:
            steps = steps or function(*arguments)
            pipe.send({**next(steps), "peak_bytes": resident("VmHWM") or 0})
        except Exception as error:  # any error of a rival is its result
            pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())}")
            return


def take_turns(rivals: Sequence[TakesTurns], rounds: int, advance: Callable[[], None], busy: int = 0) -> dict[str, Any]:
    """Every rival's median and quartiles of every number, and its time against the first's, pair by pair, beside
    ``busy`` busy processes."""
    try:
        with BusyProcesses(busy):
            for turn in range(rounds + 1):
                for rival in rivals:
                    sleep(_PAUSE)
                    rival.visit(counts=turn > 0)
                    advance()
    finally:
        for rival in rivals:
            rival.close()
    first = np.array([sample["token_s"] for sample in rivals[0].samples])
    found: dict[str, Any] = {}
    for rival in rivals:
        numbers = {name: [sample[name] for sample in rival.samples] for name in rival.samples[0]}
        numbers["time_against_first"] = (np.array(numbers["token_s"]) / first).tolist()
        found[rival.name] = {name: quartiles(values) for name, values in numbers.items()}
    return found


def best_threads(start: Callable[[int], Rival], counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Return the fastest number of threads ("threads"), and the median "token_s" for each number that was tried.

    ``start``: starts a rival with a number of threads. They run one after the other, each in a process of its own.
    """
    if len(counts) == 1:
        return {"threads": counts[0], "token_s": {}}
    found = {}
    for count in counts:
        rival = start(count)
        turns = take_turns([rival], rounds, lambda: None)
        found[str(count)] = turns[rival.name]["token_s"]["median"]
    return {"threads": int(min(found, key=lambda count: found[count])), "token_s": found}


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": middle, "low": low, "high": high}
