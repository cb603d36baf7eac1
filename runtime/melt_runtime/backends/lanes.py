"""Lanes: runs of the loop step in which every token stands in a loop of its own.

Of a LoopLM the lanes are the batch (``LoopLanes``). A loop reads and writes only its own caches, and these lie in one
buffer, loop after loop. Bound as one batch, row ``loop * slots + slot`` of a run is that loop of that sequence. What
runs before the loops and after them is in ``lane_stages.py``.

Of a MELT, whose loops share a cache, the lanes are the chunk (``ChunkLanes``; of several sequences ``BatchLanes``):
successive tokens, oldest first, each with its own ``first_loop``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..package.specs import CODA, ITEM_BYTES
from .batch_lanes import BatchLanes
from .bindings import LANES, Bindings, buffer_name, embed_bindings, lane_window, loop_bindings
from .buffers import FLOAT32, BufferState
from .control import LoopControl
from .lane_stages import Entrance, Lane, Read, Reading, lane_names, lane_state, new_tokens
from .positions import StridedRegion


class Lanes(Protocol):
    """Runs the tokens in flight of some sequences. ``window``: the most tokens in flight per sequence."""

    window: int
    slots: int
    state: BufferState

    def run(self, lanes: Sequence[Sequence[Lane]], lengths: NDArray[np.int64]) -> list[list[Read]]:
        """Run the next loop of every token, per sequence from the oldest on. What it returns is valid until the next
        run.

        Only a sequence's last token may be new; the others must have run in the last run, in this order. ``lengths``
        (slots,): tokens in the cache, before those in flight.
        """

    def left(self, slot: int) -> None:
        """Keep a sequence's oldest token in the cache. The next run begins with the one after it."""

    def hidden(self, slot: int) -> NDArray[np.floating]:
        """Return a copy of the hidden states of a sequence's tokens after the last run (tokens or more, d)."""


def make_lanes(state: BufferState) -> Lanes:
    """Return the lanes of a state, for which ``lanes_fit`` returned None."""
    if state.manifest.cache_loops:
        return LoopLanes(state)
    return ChunkLanes(state) if state.batch == 1 else BatchLanes(state)


class LoopLanes:
    """The lanes of a LoopLM's sequences, one per loop. Their hidden states have buffers of their own."""

    def __init__(self, state: BufferState):
        manifest = state.manifest
        assert manifest.cache_loops is not None
        self.state, self.slots = state, state.batch
        self.window, self.loops = lane_window(manifest), manifest.cache_loops
        self._names = lane_names(state)
        # The stages around the loops, where the package has them.
        self._entrance = Entrance(state, self._names) if manifest.has_prelude or manifest.injects else None
        self._reading = Reading(state, self._names) if manifest.has_coda else None
        self._step = self.slots * int(state.hidden.shape[-1]) * ITEM_BYTES[state.hidden.dtype]  # bytes per loop
        self._rows: dict[tuple[int, int], BufferState] = {}
        self._source, self._target = (LANES + buffer_name(state.hidden, which) for which in (1, 0))

    def run(self, lanes: Sequence[Sequence[Lane]], lengths: NDArray[np.int64]) -> list[list[Read]]:
        """Run the next loop of every token (see ``Lanes.run``)."""
        at = np.repeat(lengths[None], self.loops, axis=0)  # positions in each loop's cache
        counts = np.zeros((self.loops, self.slots), np.int64)
        for slot, tokens in enumerate(lanes):
            for lane in tokens:
                counts[lane.ran, slot] = 1
                at[: lane.ran, slot] += 1
        standing = [lane.ran for tokens in lanes for lane in tokens]
        first, last = (min(standing), max(standing)) if self.state.narrow_lanes else (0, self.loops - 1)
        entering = None if all(standing) else new_tokens(lanes)
        if entering is not None and self._entrance is not None:
            self._entrance.begin(lanes, lengths)
        if self._reading is not None:
            self._reading.begin(lanes, lengths)
        rows = self._run(first, last, entering, at, counts)
        if self._reading is None:
            shape = (last + 1 - first, self.slots, rows.manifest.vocab_size)
            by_loop = rows.view(LANES + "logits", FLOAT32, shape)
            logits = [[by_loop[lane.ran - first, slot] for lane in tokens] for slot, tokens in enumerate(lanes)]
        else:
            by_token = self._reading.run(self._source)
            logits = [list(by_token[slot, : len(tokens)]) for slot, tokens in enumerate(lanes)]
        exits = rows.view(LANES + "exit_probability", FLOAT32, (last + 1 - first, self.slots))
        self._move(first, last)
        return [
            [Read(row, exits[lane.ran - first, slot]) for lane, row in zip(tokens, logits[slot], strict=True)]
            for slot, tokens in enumerate(lanes)
        ]

    def left(self, slot: int) -> None:
        """Do nothing: the token is in the caches of all loops."""

    def hidden(self, slot: int) -> NDArray[np.floating]:
        """Not read: tokens of a LoopLM run all loops."""
        raise NotImplementedError

    def _run(
        self,
        first: int,
        last: int,
        entering: NDArray[np.int64] | None,
        lengths: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> BufferState:
        """Run loops ``first`` to ``last``, counted from 0, and the head where no coda stands before it. Return the
        state that ran them.

        ``entering``: token ids (slots,) that begin with the first loop; None: no token enters. ``lengths``, ``counts``
        (loops, slots): positions before this run in each loop's cache, and 1 where a token stands, else 0.
        """
        rows = self._rows.get((first, last)) or self._make(first, last)
        taken = slice(first, last + 1)
        present = counts[taken].reshape(-1, 1).astype(np.bool_)
        rows.current, rows.loops_run, rows.width = 0, first, 1
        embeds = entering is not None and self._entrance is None
        if entering is not None and self._entrance is None:
            rows.put(LANES + "input_ids", entering)
        control = LoopControl(present[:, 0], present, lengths[taken].reshape(-1), counts[taken].reshape(-1))
        width, context = rows.begin_loops(control)
        if entering is not None and self._entrance is not None:
            self._entrance.run()

        def work() -> None:
            rows.current, rows.loops_run = 0, first
            if embeds:
                rows.run_bound(("embed", self.slots), lambda: embed_bindings(rows.manifest, self.slots, 1))
            rows.run_loop(width, context, "first_loop/0")
            if self._reading is None:
                rows.run_head()

        rows.perform(("lanes", first, last, context, embeds), work)
        rows.commit(control, "core", (first,))
        return rows

    def _move(self, first: int, last: int) -> None:
        """Move hidden states, and what is injected, on by a loop."""
        moving = min(last + 1, self.loops - 1) - first
        if moving:
            source = StridedRegion(self._source, first * self._step, moving * self._step)
            target = StridedRegion(self._target, (first + 1) * self._step, moving * self._step)
            self.state.copy(target, source, moving * self._step, 1)
            if self._entrance is not None:
                self._entrance.move(first * self.slots, (first + 1) * self.slots, moving * self.slots)

    def _make(self, first: int, last: int) -> BufferState:
        """Make the state whose batch is loops ``first`` to ``last`` of all sequences."""
        made = lane_state(self.state, self._names)
        made.batch = (last + 1 - first) * self.slots
        moved = [buffer_name(self.state.hidden, which) for which in (0, 1)]
        for name in (*moved, "injected") if self.state.manifest.injects else moved:
            made.places[name] = (LANES + name, first * self._step)
        self._rows[first, last] = made
        return made


class ChunkLanes:
    """The lanes of a MELT's only sequence, one column of the chunk each.

    Hidden states and latents have buffers of their own, read from the oldest token's column on and written from the
    first. The keys and values of tokens in flight are written anew by every run; a coda's too, which reads the chunk
    after every run.
    """

    slots = 1

    def __init__(self, state: BufferState):
        self.state, self.window = state, lane_window(state.manifest)
        names = lane_names(state)
        self._lanes = lane_state(state, names)
        self._entrance = Entrance(state, names) if state.manifest.has_prelude or state.manifest.injects else None
        self._around = self._lanes.places  # where everything but hidden states and latents lies
        self._swapped = [one for one in state.manifest.states if one.kind == "swap"]
        self._current = self._first = 0  # the swap buffer of the last run's results, and the oldest token's column
        self._control: LoopControl

    def run(self, lanes: Sequence[Sequence[Lane]], lengths: NDArray[np.int64]) -> list[list[Read]]:
        """Run the next loop of every token (see ``Lanes.run``)."""
        [tokens] = lanes
        state, width, kept = self._lanes, len(tokens), sum(lane.ran > 0 for lane in tokens)
        current, first = self._current, self._first if kept else 0
        embeds = width > kept and self._entrance is None
        if embeds:
            state.put(LANES + "input_ids", np.array([[tokens[-1].token]]))
        if self._entrance is not None:
            self._enter(lanes, lengths, current, first, kept)
        first_loop = np.array([[not lane.ran for lane in tokens]])
        state.put(LANES + "first_loop", first_loop)
        active = np.array([[lane.active for lane in tokens]])
        self._control = LoopControl(first_loop, active, lengths.copy(), np.array([width]))
        _, context = state.begin_loops(self._control)

        def work() -> None:
            if embeds:
                self._embed(current, first + kept)
            self._loop(width, context, current, first)
            if state.manifest.has_coda:
                self._coda(width, context, 1 - current)
            self._head(current if state.manifest.has_coda else 1 - current, width)

        state.perform(("lanes", width, context, current, first, kept), work)
        self._current, self._first = 1 - current, 0
        logits = state.view(LANES + "logits", FLOAT32, (width, state.manifest.vocab_size))
        exits = state.view(LANES + "exit_probability", FLOAT32, (width,))
        return [[Read(logits[index], exits[index]) for index in range(width)]]

    def left(self, slot: int) -> None:
        """Copy the oldest token's keys and values into read-only caches, and begin with the next column."""
        self._first += 1
        for stage in ("core", CODA):
            self._lanes.commit(replace(self._control, chunk_lengths=np.array([self._first])), stage)

    def hidden(self, slot: int = 0) -> NDArray[np.floating]:
        """Return a copy of the hidden states after the last run (see ``Lanes.hidden``)."""
        self._place(self._current, 0)
        self._lanes.current, self._lanes.width = self._current, self._control.active.shape[1]
        return self._lanes.read("hidden")[slot]  # type: ignore[no-any-return]

    def _enter(
        self, lanes: Sequence[Sequence[Lane]], lengths: NDArray[np.int64], current: int, first: int, kept: int
    ) -> None:
        """Bring what is injected to the first columns, and run the prelude of the new token, if there is one."""
        assert self._entrance is not None
        if first:
            self._entrance.move(first, 0, kept)
        if len(lanes[0]) > kept:
            self._entrance.begin(lanes, lengths)
            self._entrance.run(current, first + kept, kept)

    def _embed(self, current: int, column: int) -> None:
        """Embed the new token into a column of the hidden states that the next run reads."""

        def bindings() -> Bindings:
            self._place(current, column)
            inputs, outputs = embed_bindings(self.state.manifest, 1, 1)
            return inputs, tuple(replace(one, buffer=buffer_name(self.state.hidden, current)) for one in outputs)

        self._lanes.run_bound(("embed", current, column), bindings)

    def _loop(self, width: int, context: int, current: int, first: int) -> None:
        def bindings() -> Bindings:
            self._place(current, first)
            return loop_bindings(self.state.manifest, 1, width, context, current)

        self._lanes.run_bound(("loop_step", width, context, current, first), bindings)

    def _coda(self, width: int, context: int, current: int) -> None:
        """Run the coda on all tokens, from the newest hidden states to the other buffer."""

        def bindings() -> Bindings:
            self._place(current, 0)
            return loop_bindings(self.state.manifest, 1, width, context, current, step=CODA)

        self._lanes.run_bound((CODA, width, context, current), bindings)

    def _head(self, current: int, width: int) -> None:
        """Run the head on all tokens, as a batch."""

        def bindings() -> Bindings:
            self._place(current, 0)
            return self._lanes.head_bindings(buffer_name(self.state.hidden, current))

        try:
            self._lanes.batch = width
            self._lanes.run_bound(("lm_head", width, current), bindings)
        finally:
            self._lanes.batch = 1

    def _place(self, current: int, column: int) -> None:
        """Say where the next bindings find hidden states and latents: what is read from ``column`` on, results from
        0."""
        places = {}
        for state in self._swapped:
            step = int(state.shape[-1]) * ITEM_BYTES[state.dtype]
            for which in (0, 1):
                name = buffer_name(state, which)
                places[name] = (LANES + name, column * step if which == current else 0)
        self._lanes.places = self._around | places
