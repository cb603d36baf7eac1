"""What a scheduler counts: requests, tokens, depth, and how long people wait. Memory is fixed, whatever happens."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
OUTCOMES = ("stop", "length", "cancelled", "deadline", "failed", "refused")
DEEPEST = 64  # depths from here on are counted together
_RECENT = 0.2  # the weight of the newest request in the mean that retry_after goes by


@dataclass(frozen=True)
class Histogram:
    """Observations in seconds. counts: how many were at most each of ``bounds`` and above the one before, and last
    those above all of them; ``total``: their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)


@dataclass(frozen=True)
class SchedulerMetrics:
    """A scheduler at one moment. Counts run from its start.

    waiting, running: requests now; slots: how many can run. requests: those that ended by outcome: the finish reasons,
    "failed" (an error) and "refused" (no room). prompt_tokens: run through the model; generated_tokens: drawn.
    prefix_hits: prompts whose beginning was put back instead of run; prefix_tokens: the tokens of these beginnings;
    prefix_bytes: what is kept of prompts now. depth: how many tokens were drawn after so many loops (DEEPEST: so many
    or more). first_token: seconds from submission; inter_token: from one token of a request to its next. state_bytes:
    all slots' state; weights_bytes: as stored.
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


class Meter:
    """Counts while a scheduler works; any thread may ask or tell."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = dict.fromkeys(OUTCOMES, 0)
        self._prompt = self._generated = self._hits = self._reused = 0
        self._depth: Counter[int] = Counter()
        self._first, self._inter = _Times(), _Times()
        self._held: float | None = None

    def ended(self, outcome: str, held: float | None = None) -> None:
        """A request ended. held: how many seconds it had a slot; None: it never had one."""
        with self._lock:
            self._requests[outcome] += 1
            if held is not None:
                self._held = held if self._held is None else self._held + _RECENT * (held - self._held)

    def prefilled(self, tokens: int) -> None:
        """Prompt tokens went through the model."""
        with self._lock:
            self._prompt += tokens

    def reused(self, tokens: int) -> None:
        """The first tokens of a prompt were put back instead of being run."""
        with self._lock:
            self._hits += 1
            self._reused += tokens

    def sampled(self, depth: int, seconds: float, first: bool) -> None:
        """A token was drawn after ``depth`` loops, so long after the submission or the token before."""
        with self._lock:
            self._generated += 1
            self._depth[min(depth, DEEPEST)] += 1
            (self._first if first else self._inter).add(seconds)

    def retry_after(self, ahead: int, slots: int) -> float:
        """Seconds until ``ahead`` requests have come and gone, as long as recent ones took; 1 before any did."""
        with self._lock:
            held = 1.0 if self._held is None else self._held
        return max(held * ahead / slots, 0.1)

    def snapshot(
        self, waiting: int, running: int, slots: int, state_bytes: int, weights_bytes: int, prefix_bytes: int
    ) -> SchedulerMetrics:
        """All of it now."""
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
            )


class _Times:
    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def histogram(self) -> Histogram:
        return Histogram(SECONDS, tuple(self.counts), self.total)
