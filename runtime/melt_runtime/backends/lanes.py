"""Lanes: runs of a LoopLM's loop step in which every row of the batch stands in a loop of its own.

A LoopLM's loop reads and writes only its own caches, and these lie in one buffer, loop after loop. Bound as one batch,
row ``loop * slots + slot`` of a run is that loop of that sequence, so one run moves as many successive tokens of a
sequence one loop further as there are loops.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from ..package.specs import ITEM_BYTES
from .bindings import LANES, buffer_name, embed_bindings, lane_buffers
from .buffers import FLOAT32, BufferState, StridedRegion
from .control import LoopControl


class Lanes:
    """The lanes of a state's sequences. Their hidden states have buffers of their own; the caches are the state's."""

    def __init__(self, state: BufferState):
        self.state, self.slots = state, state.batch
        self.loops = int(state.manifest.cache_loops or 1)
        self._vocab = state.manifest.vocab_size
        self._step = self.slots * int(state.hidden.shape[-1]) * ITEM_BYTES[state.hidden.dtype]  # bytes per loop
        self._rows: dict[tuple[int, int], BufferState] = {}
        self._source, self._target = (LANES + buffer_name(state.hidden, which) for which in (1, 0))

    def run(
        self,
        first: int,
        last: int,
        entering: NDArray[np.int64] | None,
        lengths: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Run loops ``first`` to ``last`` (0-based), each over at most one token per sequence, and move all tokens on.

        ``entering``: token ids (slots,) that begin with the first loop; None: no token enters. ``lengths``, ``counts``
        (loops, slots): positions of each loop's cache before this run, and 1 where a token stands, else 0. Returns the
        head's logits (loops, slots, vocab) of these loops, valid until the next run.
        """
        if not self.state.narrow_lanes:
            first, last = 0, self.loops - 1
        rows = self._rows.get((first, last)) or self._make(first, last)
        taken = slice(first, last + 1)
        counts, lengths = counts[taken].reshape(-1), lengths[taken].reshape(-1)
        present = counts.astype(np.bool_)[:, None]
        rows.current, rows.loops_run, rows.width = 0, first, 1
        if entering is not None:
            rows.put(LANES + "input_ids", entering)
        width, context = rows.begin_loops(LoopControl(present[:, 0], present, lengths, counts))

        def work() -> None:
            rows.current, rows.loops_run = 0, first
            if entering is not None:
                rows.run_bound("embed", ("embed", self.slots), embed_bindings(rows.manifest, self.slots, 1))
            rows.run_loop(width, context, "first_loop/0")
            rows.run_head()

        rows.perform(("lanes", first, last, context, entering is not None), work)
        logits = rows.view(LANES + "logits", FLOAT32, (last + 1 - first, self.slots, self._vocab))
        moving = min(last + 1, self.loops - 1) - first
        if moving:
            source = StridedRegion(self._source, first * self._step, moving * self._step)
            target = StridedRegion(self._target, (first + 1) * self._step, moving * self._step)
            rows.copy(target, source, moving * self._step, 1)
        return logits

    def _make(self, first: int, last: int) -> BufferState:
        """Make the state whose batch is loops ``first`` to ``last`` of all sequences."""
        state = self.state
        made = copy.copy(state)
        made.batch, made.prefix, made.bindings = (last + 1 - first) * self.slots, LANES, OrderedDict()
        made.places = {
            buffer_name(cache, 0, first): state.places[buffer_name(cache, 0, first)]
            for cache in state.manifest.states
            if cache.kind == "per_loop"
        }
        for name in (*lane_buffers(state.manifest, self.slots), *(LANES + more for more in state.lane_outputs())):
            made.places[name.removeprefix(LANES)] = (name, 0)
        for which in (0, 1):
            hidden = buffer_name(state.hidden, which)
            made.places[hidden] = (LANES + hidden, first * self._step)
        made.detach()
        self._rows[first, last] = made
        return made
