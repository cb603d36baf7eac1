"""Times of what generation runs: a token, a loop, a prompt, and what a token takes outside the graphs."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from ..backends.control import LoopControl
from ..decoding.loop_driver import LoopDriver
from ..decoding.settings import LoopSettings
from ..runtime import Runtime
from ..sampling.sampler import Sampler, SamplingParams

_SETTLING = 2.0  # seconds: a runtime looks five times per second at what computes beside it, and tries two ways


class Stopwatch:
    """A timer of what generation runs: the loop driver's chunks, and the likeliest token after them."""

    def __init__(self, driver: LoopDriver):
        self.driver, self._greedy = driver, Sampler(SamplingParams())

    def decode(self, context: int, loops: int, tokens: int) -> tuple[float, float]:
        """Return the median seconds per token and per loop, over ``tokens`` tokens after ``context`` others and one
        warm-up token.

        A loop's time is that of a token without the head, divided by its loops.
        """
        driver, settings = self.driver, LoopSettings(loops)
        self._declare(context, loops)
        times, new = [], [[0]] * driver.batch
        for _ in range(tokens + 1):
            if not driver.room(0):
                self._declare(context, loops)
            started = perf_counter()
            new = self._next(new, settings)
            times.append(perf_counter() - started)
        return float(np.median(times[1:])), self.loop(context, loops, tokens)

    def prefill(self, prompt: int, chunk: int, loops: int) -> float:
        """Return the seconds from a prompt of ``prompt`` tokens to the next token."""
        self.driver.reset()
        started = perf_counter()
        self._next([[0] * prompt] * self.driver.batch, LoopSettings(loops, chunk=chunk))
        return perf_counter() - started

    def _next(self, new: list[list[int]], settings: LoopSettings) -> list[list[int]]:
        logits = self.driver.advance(new, settings)
        return [[logits.sample(slot, self._greedy, ())] for slot in range(self.driver.batch)]

    def loop(self, context: int, loops: int, tokens: int) -> float:
        """Return the median seconds per loop of ``tokens`` tokens after ``context`` others, without the head."""
        batch, state = self.driver.batch, self.driver.state
        one, each = np.ones((batch, 1), np.bool_), np.ones(batch, np.int64)
        control = LoopControl(one[:, 0], one, np.full(batch, context, np.int64), each)
        times = []
        for _ in range(tokens + 1):
            started = perf_counter()
            state.run_chunk(np.zeros((batch, 1), np.int64), control, loops, head=False)
            state.read("hidden")  # waits for a device
            times.append((perf_counter() - started) / loops)
        return float(np.median(times[1:]))

    def _declare(self, context: int, loops: int) -> None:
        """Set the number of cached tokens without running them; the cache's contents do not affect times."""
        for slot in range(self.driver.batch):
            self.driver.assume(slot, context, loops)


def settle(watches: Sequence[Stopwatch], context: int) -> None:
    """Decode until every package's runtime has noticed which processes compute beside it."""
    for watch in watches:
        end = perf_counter() + _SETTLING
        while perf_counter() < end:
            watch.decode(context, 1, 1)


class _Timed:
    """An ONNX Runtime session that times its bound runs."""

    def __init__(self, session: Any):
        self.session, self.seconds, self._run = session, 0.0, session.run_with_iobinding

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        """Run and add the time to ``seconds``."""
        started = perf_counter()
        self._run(binding)
        self.seconds += perf_counter() - started


def overhead(runtime: Runtime, tokens: int = 64, loops: int | None = None) -> float | None:
    """Return the share of generation time outside the graphs: binding, loop driver, sampling. None for other backends
    than ONNX Runtime."""
    sessions = getattr(runtime.backend, "sessions", None)
    if sessions is None:
        return None
    request: dict[str, Any] = {"ignore_eos": True, "loops": loops, "exit_threshold": 1.0, "max_tokens": tokens}
    runtime.generate([0], **request | {"max_tokens": 2})
    timed = {name: _Timed(session) for name, session in sessions.items()}
    kept = dict(sessions)
    sessions.update(timed)
    try:
        started = perf_counter()
        runtime.generate([0], **request)
        total = perf_counter() - started
    finally:
        sessions.update(kept)
    return 1 - sum(session.seconds for session in timed.values()) / total
