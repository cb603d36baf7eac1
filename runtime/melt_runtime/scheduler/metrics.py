"""Counters of a scheduler: requests, tokens, depth, waiting times. They take constant memory."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass

from ..results import PipelineUse

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WHOLE_SECONDS = (
    *SECONDS,
    120.0,
    300.0,
    600.0,
)  # of a request
OUTCOMES = ("stop", "length", "cancelled", "deadline", "failed", "refused")
DEEPEST = 64  # this depth and greater ones share a bucket
_RECENT = 0.2  # weight of the newest request in the moving average behind retry_after


@dataclass(frozen=True)
class Histogram:
    """Observations in seconds. ``counts``: observations per bucket, each up to its bound in ``bounds``, and last those
    above all bounds. ``total``: the sum of all observations."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """The number of observations."""
        return sum(self.counts)


NOTHING = Histogram(WHOLE_SECONDS, (0,) * (len(WHOLE_SECONDS) + 1), 0.0)


@dataclass(frozen=True)
class SchedulerMetrics:
    """The counters of a scheduler at one moment, since it was opened.

    ``waiting``, ``running``: requests now. ``slots``: the most that can run. ``requests``: ended requests by outcome: a
    finish reason, "failed" (an error) or "refused" (queue full). ``prompt_tokens``: tokens run by prefill.
    ``generated_tokens``: tokens sampled. ``prefix_hits``: prompts with a restored beginning; ``prefix_tokens``: the
    tokens restored; ``prefix_bytes``: size of the prefix cache now. ``depth``: sampled tokens by number of loops
    (DEEPEST: that many or more). ``first_token``: seconds from submission to the first token. ``inter_token``: seconds
    between tokens of one request. ``state_bytes``: state of all slots. ``weights_bytes``: as stored. ``pipeline_runs``,
    ``pipeline_tokens``, ``drafts_held``, ``drafts_dropped``: of ended requests, as in ``PipelineUse``.
    ``queued``: seconds from submission to a slot. ``whole``: seconds from submission to the end, of every request that
    was not refused.
    """

    waiting: int
    running: int
    slots: int
    requests: dict[str, int]
    prompt_tokens: int
    generated_tokens: int
    depth: dict[int, int]
    first_token: Histogram
    inter_token: Histogram
    state_bytes: int
    weights_bytes: int
    prefix_hits: int = 0
    prefix_tokens: int = 0
    prefix_bytes: int = 0
    pipeline_runs: int = 0
    pipeline_tokens: int = 0
    drafts_held: tuple[int, ...] = ()
    drafts_dropped: tuple[int, ...] = ()
    queued: Histogram = NOTHING
    whole: Histogram = NOTHING


class Meter:
    """The counters of a running scheduler. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = dict.fromkeys(OUTCOMES, 0)
        self._prompt = self._generated = self._hits = self._reused = 0
        self._depth: Counter[int] = Counter()
        self._first, self._inter = _Times(SECONDS), _Times(SECONDS)
        self._queued, self._whole = _Times(WHOLE_SECONDS), _Times(WHOLE_SECONDS)
        self._held: float | None = None
        self._runs = self._piped = 0
        self._drafts_held, self._drafts_dropped = Counter[int](), Counter[int]()

    def pipelined(self, use: PipelineUse | None) -> None:
        """Count what pipelined decoding did for an ended request."""
        if use is None:
            return
        with self._lock:
            self._runs += use.runs
            self._piped += use.tokens
            self._drafts_held.update(dict(enumerate(use.held)))
            self._drafts_dropped.update(dict(enumerate(use.dropped)))

    def admitted(self, queued: float) -> None:
        """Count a request that got a slot. ``queued``: seconds since its submission."""
        with self._lock:
            self._queued.add(queued)

    def ended(self, outcome: str, held: float | None = None, whole: float | None = None) -> None:
        """Count an ended request. ``held``: seconds in a slot; None if it never had one. ``whole``: seconds since its
        submission; None if it was refused."""
        with self._lock:
            self._requests[outcome] += 1
            if whole is not None:
                self._whole.add(whole)
            if held is not None:
                self._held = held if self._held is None else self._held + _RECENT * (held - self._held)

    def prefilled(self, tokens: int) -> None:
        """Count prompt tokens that ran."""
        with self._lock:
            self._prompt += tokens

    def reused(self, tokens: int) -> None:
        """Count prompt tokens restored from the prefix cache."""
        with self._lock:
            self._hits += 1
            self._reused += tokens

    def sampled(self, depth: int, seconds: float, first: bool) -> None:
        """Count a token sampled after ``depth`` loops. ``seconds``: since submission (first token) or the preceding
        token."""
        with self._lock:
            self._generated += 1
            self._depth[min(depth, DEEPEST)] += 1
            (self._first if first else self._inter).add(seconds)

    def retry_after(self, ahead: int, slots: int) -> float:
        """Estimate the seconds until ``ahead`` requests have ended, from recent requests; 1 second each before any has
        ended."""
        with self._lock:
            held = 1.0 if self._held is None else self._held
        return max(held * ahead / slots, 0.1)

    def snapshot(
        self, waiting: int, running: int, slots: int, state_bytes: int, weights_bytes: int, prefix_bytes: int
    ) -> SchedulerMetrics:
        """Return all counters."""
        with self._lock:
            return SchedulerMetrics(
                waiting,
                running,
                slots,
                dict(self._requests),
                self._prompt,
                self._generated,
                dict(sorted(self._depth.items())),
                self._first.histogram(),
                self._inter.histogram(),
                state_bytes,
                weights_bytes,
                self._hits,
                self._reused,
                prefix_bytes,
                self._runs,
                self._piped,
                tuple(self._drafts_held[loop] for loop in sorted(self._drafts_held)),
                tuple(self._drafts_dropped[loop] for loop in sorted(self._drafts_dropped)),
                self._queued.histogram(),
                self._whole.histogram(),
            )


class _Times:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def histogram(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.total)
