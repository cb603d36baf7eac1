"""Pipelined decoding: each run of the loop step moves several successive tokens one loop further each.

Token p + 1 may run its first loop while token p runs its second. The next token is known only after the last loop, so
it is drafted from what the head says after an earlier one. After every run the head reads all tokens in flight. Where a
prediction differs from the token that was fed behind it, that token and all behind it are dropped, and the prediction
enters (the latest opinion wins). What a dropped token wrote into a cache is written over before any token reads it.

A LoopLM's loop t reads and writes the caches of loop t only, and those of earlier tokens are final by then: the result
is that of one token after the other. The loops of a MELT share a cache, and there a token in flight sees the one before
it as a later loop left it, but not yet the last: another mathematics, between plain decoding and the chunks of training
(``melt_models.decoding`` defines it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends.buffers import BufferState
from ..backends.lane_stages import Lane, Read
from ..backends.lanes import make_lanes
from ..errors import ArgumentError
from ..package.manifest import Manifest
from ..results import PipelineUse
from .early_exit import Depth
from .settings import GenerationOptions, LoopSettings
from .start import start_row


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

    def hold(self, by: int) -> None:
        """Count a draft that was the next token."""
        self.held[min(by, len(self.held) - 1)] += 1

    def drop(self, by: int) -> None:
        """Count a draft that was not the next token."""
        self.dropped[min(by, len(self.dropped) - 1)] += 1

    def use(self) -> PipelineUse | None:
        """Return the counts so far; None if nothing ran."""
        if not self.runs:
            return None
        return PipelineUse(self.runs, self.tokens, self.rows, tuple(self.held[1:]), tuple(self.dropped[1:]))


class Pipelining(NamedTuple):
    """How a sequence is pipelined. ``always``: not only where it is the faster way."""

    draft: Draft
    always: bool = True


class Advancing(NamedTuple):
    """A sequence that runs: the depth of its tokens, and what drafts them."""

    settings: LoopSettings
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
    """A token in flight. ``by``: the loop whose prediction it was; 0: it was sampled.

    ``ran``: its loops so far. ``left``: it runs no more loops. ``logits``: the head's after it in the last run; None
    before its first. ``depth``: decides whether it leaves early, as it would alone in a chunk; None until asked.
    """

    token: int
    by: int = 0
    ran: int = 0
    left: bool = False
    logits: NDArray[np.float32] | None = None
    depth: Depth | None = None


class _Sequence:
    """One sequence's tokens in flight, oldest first."""

    def __init__(self, counts: PipelineCounts):
        self.counts, self.version = counts, _UNKNOWN
        self.flights: list[_Flight] = []

    def drop(self, index: int) -> None:
        for flight in self.flights[index:]:
            self.counts.drop(flight.by)
        del self.flights[index:]


class Pipeline:
    """The tokens in flight of a driver's sequences. The backend's errors propagate."""

    def __init__(self, driver: Sequences):
        self.driver, self.lanes = driver, make_lanes(driver.state)
        self._sequences = [_Sequence(PipelineCounts(self.lanes.window)) for _ in range(self.lanes.slots)]
        self._logits: dict[int, NDArray[np.float32]] = {}  # by sequence, after its token that arrived

    def begin(self, slot: int, counts: PipelineCounts) -> None:
        """Count a sequence into ``counts`` from now on; if it is another than before, forget its tokens in flight."""
        if self._sequences[slot].counts is not counts:
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
        one, owner = self._sequences[slot], self.lanes.state.lane_owner
        if one.version != self.driver.versions[slot] or owner[0] is not self:
            one.drop(0)
            one.version = int(self.driver.versions[slot])
        if one.flights and one.flights[0].token == token:
            one.counts.hold(one.flights[0].by)
            return
        one.drop(0)
        one.flights.append(_Flight(token))

    def ran(self, slot: int) -> list[int]:
        """Return how many loops each of a sequence's tokens in flight has run, oldest token first."""
        return [flight.ran for flight in self._sequences[slot].flights]

    def run(self, advancing: Mapping[int, Advancing]) -> list[int]:
        """Run every token in flight for one loop. Return the sequences whose oldest token is now in the cache.

        ``advancing``: by slot, all sequences that have been fed. The others lose their tokens in flight. Where a fed
        token has left the loops before, nothing runs.
        """
        arrived = [slot for slot in advancing if self._sequences[slot].flights[0].left]
        if arrived:
            for slot in arrived:
                self._arrive(slot)
            return arrived
        for slot, one in enumerate(self._sequences):
            if slot not in advancing:
                one.drop(0)
                continue
            self._judge(slot, advancing[slot])
            one.counts.runs += 1
            one.counts.rows += len(one.flights)
            one.version = _UNKNOWN  # until this run is counted: an exception must not leave tokens in flight
        self.lanes.state.lane_owner[0] = self
        lanes = [self._lanes_of(slot, advancing.get(slot)) for slot in range(len(self._sequences))]
        reads = self.lanes.run(lanes, self.driver.lengths[: self.lanes.slots])
        for slot, how in advancing.items():
            self._count(slot, how.settings, reads[slot])
        return [slot for slot in advancing if self._sequences[slot].flights[0].left and self._arrive(slot)]

    def row(self, slot: int) -> NDArray[np.float32]:
        """Return the logits (vocab,) after a sequence's token that is now in the cache; valid until the next run."""
        return self._logits[slot]

    def _lanes_of(self, slot: int, how: Advancing | None) -> list[Lane]:
        """Return a sequence's tokens in flight as the backend runs them."""
        flights = self._sequences[slot].flights
        made = [Lane(one.token, one.ran, not one.left) for one in flights]
        if how is not None and not made[-1].ran:
            at = int(self.driver.lengths[slot]) + len(made) - 1
            made[-1] = made[-1]._replace(start=start_row(self.lanes.state.manifest, how.settings, at))
        return made

    def _count(self, slot: int, settings: LoopSettings, reads: Sequence[Read]) -> None:
        """Note what a run did to a sequence's tokens, and which have left the loops."""
        one = self._sequences[slot]
        for index, (flight, read) in enumerate(zip(one.flights, reads, strict=True)):
            flight.logits = read.logits
            if flight.left:
                continue
            flight.ran += 1
            flight.left = flight.ran >= settings.loops or (
                settings.adaptive and self._leaves(flight, settings, slot, index, read)
            )
        one.version = int(self.driver.versions[slot])

    def _leaves(self, flight: _Flight, settings: LoopSettings, slot: int, index: int, read: Read) -> bool:
        """Return whether a token, at place ``index`` in flight, leaves after the loop that has just run. ``read``: what
        that run says of it."""
        depth = flight.depth = flight.depth or Depth([settings], np.ones((1, 1), np.bool_))
        gate = np.array([[read.exit_probability]]) if self.lanes.state.manifest.has_exit_gate else None
        depth.ran(gate, lambda: self.lanes.hidden(slot)[None, None, index], lambda: read.logits[None])
        return not depth.active.any()

    def _arrive(self, slot: int) -> bool:
        """Commit a sequence's oldest token. Returns True."""
        one = self._sequences[slot]
        one.version = _UNKNOWN
        oldest = one.flights.pop(0)
        assert oldest.logits is not None
        self._logits[slot] = oldest.logits
        one.counts.tokens += 1
        self.lanes.left(slot)
        self.driver.commit(slot, oldest.ran)
        one.version = int(self.driver.versions[slot])
        return True

    def _judge(self, slot: int, how: Advancing) -> None:
        """Compare the last run's predictions with the tokens that follow; drop what differs, and enter the newest."""
        one, ahead = self._sequences[slot], list[int]()
        most = min(self.lanes.window, self.driver.room(slot), how.settings.loops)
        for index, flight in enumerate(one.flights):
            if flight.logits is None:  # fed after the last run, which says nothing about it
                return
            if index:
                ahead.append(flight.token)
            following = one.flights[index + 1] if index + 1 < len(one.flights) else None
            guess = how.draft(flight.logits, ahead) if index + 1 < most else None
            if guess is not None and following is not None and following.token == guess:
                continue
            one.drop(index + 1)
            if guess is not None:
                one.flights.append(_Flight(guess, flight.ran))
            return


def cannot_pipeline(why: str) -> ArgumentError:
    """Return the refusal of a request whose tokens must be pipelined and cannot be."""
    return ArgumentError(f"pipeline is 'on', but tokens cannot be pipelined: {why}")


def may_pipeline(manifest: Manifest, options: GenerationOptions) -> bool:
    """Return whether a request's tokens may be pipelined. Where that changes them, as with a shared cache, it must be
    asked for."""
    if options.loops.loops == 1 or options.pipeline == "off":
        return False
    return options.pipeline == "on" or manifest.cache_loops is not None
