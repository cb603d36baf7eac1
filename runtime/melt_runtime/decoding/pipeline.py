"""Pipelined decoding of a LoopLM: each run of the loop step moves several successive tokens one loop further each.

A LoopLM's loop t reads and writes the caches of loop t only, and those of earlier tokens are final by then. So token
p + 1 may run its first loop while token p runs its second: the result is that of one token after the other. The next
token is known only after the last loop, so it is drafted from what the head says after an earlier one. After every run
the head reads all tokens in flight. Where a prediction differs from the token that was fed behind it, that token and
all behind it are dropped, and the prediction enters (the latest opinion wins). What a dropped token wrote into a cache
is written over before any token reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends.buffers import BufferState
from ..backends.lanes import Lanes
from ..results import PipelineUse


class Draft(Protocol):
    """Predicts a sequence's next token from logits of an early loop."""

    def __call__(self, logits: NDArray[np.float32], ahead: Sequence[int]) -> int | None:
        """Return the token after the sequence's tokens and ``ahead``; None: none is wanted, or none can be told.

        ``logits``: (vocab,), an early loop's, after the last token of ``ahead`` or of the sequence.
        """


class PipelineCounts:
    """Counts what pipelined decoding does for one sequence, of at most ``loops`` loops per token."""

    def __init__(self, loops: int):
        self.runs = self.tokens = self.rows = 0
        self.held, self.dropped = [0] * (loops + 1), [0] * (loops + 1)  # by the loop that drafted; 0: sampled

    def use(self) -> PipelineUse | None:
        """Return the counts so far; None if nothing ran."""
        if not self.runs:
            return None
        return PipelineUse(self.runs, self.tokens, self.rows, tuple(self.held[1:]), tuple(self.dropped[1:]))


class Pipelining(NamedTuple):
    """How a sequence is pipelined. ``always``: not only where it is the faster way."""

    draft: Draft
    always: bool = True
    counts: PipelineCounts | None = None


class Advancing(NamedTuple):
    """A sequence that runs: loops per token, and what drafts its tokens."""

    loops: int
    draft: Draft


class Sequences(Protocol):
    """The sequences that a pipeline moves on, as a loop driver keeps them.

    ``lengths``, ``versions`` (batch,): tokens in the cache, and changes so far.
    """

    state: BufferState
    lengths: NDArray[np.int64]
    versions: NDArray[np.int64]

    def room(self, slot: int) -> int:
        """Return how many more tokens of one sequence fit."""

    def commit(self, slot: int, loops: int) -> None:
        """Count one more token of a sequence, whose keys and values are in the cache of every loop."""


_UNKNOWN = -1  # the version of a sequence whose tokens in flight must not be used


@dataclass(eq=False)
class _Flight:
    """A token in flight. ``ran``: its loops so far. ``by``: the loop whose prediction it was; 0: it was sampled."""

    token: int
    by: int = 0
    ran: int = 0


class _Sequence:
    """One sequence's tokens in flight, oldest first. ``fresh``: whether the last run's logits are theirs."""

    def __init__(self, counts: PipelineCounts):
        self.counts = counts
        self.flights: list[_Flight] = []
        self.version, self.fresh = _UNKNOWN, False

    def drop(self, index: int) -> None:
        for flight in self.flights[index:]:
            self.counts.dropped[flight.by] += 1
        del self.flights[index:]


class Pipeline:
    """The tokens in flight of a driver's sequences. Raises nothing of its own; the backend's errors propagate."""

    def __init__(self, driver: Sequences):
        self.driver, self.lanes = driver, Lanes(driver.state)
        self._sequences = [_Sequence(PipelineCounts(self.lanes.loops)) for _ in range(self.lanes.slots)]
        self._logits: NDArray[np.float32]
        self._first = 0  # the loop of the logits' first row
        self._final: list[int] = [0] * self.lanes.slots  # loops of each sequence's last final token

    def begin(self, slot: int, counts: PipelineCounts) -> None:
        """Forget a sequence's tokens in flight, and count into ``counts`` from now on."""
        self._sequences[slot] = _Sequence(counts)

    def decode(self, token: int, how: Advancing, between: Callable[[], None] | None = None) -> NDArray[np.float32]:
        """Bring the token of a driver's only sequence into the cache. Return the logits (vocab,) after it.

        ``between``: called between runs; an exception in it leaves the sequence as it was.
        """
        self.feed(0, token)
        while not self.run({0: how}):
            if between is not None:
                between()
        return self.row(0)

    def feed(self, slot: int, token: int) -> None:
        """Give a sequence its next token, the one after all that are in the cache."""
        one = self._sequences[slot]
        if one.version != self.driver.versions[slot]:
            one.drop(0)
            one.version = int(self.driver.versions[slot])
        if one.flights and one.flights[0].token == token:
            one.counts.held[one.flights[0].by] += 1
            return
        one.drop(0)
        one.flights.append(_Flight(token))

    def run(self, advancing: Mapping[int, Advancing]) -> list[int]:
        """Run every token in flight for one loop. Return the sequences whose oldest token is now in the cache.

        ``advancing``: by slot, all sequences that have been fed. The others lose their tokens in flight.
        """
        driver, loops, slots = self.driver, self.lanes.loops, self.lanes.slots
        lengths = np.repeat(driver.lengths[None, :slots], loops, axis=0)
        counts = np.zeros((loops, slots), np.int64)
        entering: NDArray[np.int64] | None = None
        ran = []
        for slot, one in enumerate(self._sequences):
            if slot not in advancing:
                one.drop(0)
                continue
            if one.fresh:
                self._judge(slot, advancing[slot])
            for flight in one.flights:
                counts[flight.ran, slot] = 1
                # Positions of each loop's cache, up to the oldest token that still has to run there.
                lengths[: flight.ran, slot] += 1
                if not flight.ran:
                    entering = np.zeros(slots, np.int64) if entering is None else entering
                    entering[slot] = flight.token
                ran.append(flight.ran)
            one.counts.runs += 1
            one.counts.rows += len(one.flights)
            one.version = _UNKNOWN  # until this run is counted: an exception must not leave tokens in flight
        self._first = min(ran) if driver.state.narrow_lanes else 0
        self._logits = self.lanes.run(self._first, max(ran), entering, lengths, counts)
        return [slot for slot, (most, _) in advancing.items() if self._move(slot, most)]

    def row(self, slot: int) -> NDArray[np.float32]:
        """Return the logits (vocab,) after a sequence's token that is now in the cache; valid until the next run."""
        return self._logits[self._final[slot] - 1 - self._first, slot]

    def _move(self, slot: int, loops: int) -> bool:
        """Count a run's loops. Return whether the oldest token is final; then commit it."""
        one = self._sequences[slot]
        for flight in one.flights:
            flight.ran += 1
        final = one.flights[0].ran == loops
        if final:
            del one.flights[0]
            one.counts.tokens += 1
            self._final[slot] = loops
            self.driver.commit(slot, loops)
        one.fresh, one.version = True, int(self.driver.versions[slot])
        return final

    def _judge(self, slot: int, how: Advancing) -> None:
        """Compare the last run's predictions with the tokens that follow; drop what differs, and enter the newest."""
        one, ahead = self._sequences[slot], list[int]()
        room = self.driver.room(slot)
        for index, flight in enumerate(one.flights):
            if not flight.ran:  # fed after the last run, which says nothing about it
                return
            if index:
                ahead.append(flight.token)
            following = one.flights[index + 1] if index + 1 < len(one.flights) else None
            guess = None
            if index + 1 < room:
                guess = how.draft(self._logits[flight.ran - 1 - self._first, slot], ahead)
            if guess is not None and following is not None and following.token == guess:
                continue
            one.drop(index + 1)
            if guess is not None:
                one.flights.append(_Flight(guess, flight.ran))
            return
