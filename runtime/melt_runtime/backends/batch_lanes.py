"""The lanes of several MELT sequences: one run holds a chunk of every sequence, each token in a loop of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..package.specs import ITEM_BYTES
from .bindings import LANES, Bindings, buffer_name, embed_bindings, lane_window, loop_bindings
from .buffers import FLOAT32, BufferState
from .control import LoopControl
from .lane_stages import Lane, Read, lane_names, lane_state, new_tokens
from .positions import StridedRegion


class BatchLanes:
    """The lanes of several MELT sequences, the tokens of each in a row of the chunk, from the first column on.

    Sequences keep different numbers of tokens from run to run, so hidden states and latents are copied between runs:
    from the buffers that a run writes to those that the next one reads.
    """

    def __init__(self, state: BufferState):
        self.state, self.slots, self.window = state, state.batch, lane_window(state.manifest)
        self._lanes = lane_state(state, lane_names(state))
        self._swapped = [one for one in state.manifest.states if one.kind == "swap"]
        self._first, self._width = [0] * self.slots, 0  # each sequence's oldest token's column, and columns of a row
        self._control: LoopControl

    def run(self, lanes: Sequence[Sequence[Lane]], lengths: NDArray[np.int64]) -> list[list[Read]]:
        """Run the next loop of every token (see ``Lanes.run``)."""
        state, width = self._lanes, max(len(tokens) for tokens in lanes)
        kept = [sum(lane.ran > 0 for lane in tokens) for tokens in lanes]
        self._keep(kept, width)
        self._enter(lanes, kept, width)
        self._first, self._width = [0] * self.slots, width
        counts = np.array([len(tokens) for tokens in lanes])
        first_loop, active = np.ones((self.slots, width), np.bool_), np.zeros((self.slots, width), np.bool_)
        for slot, tokens in enumerate(lanes):
            first_loop[slot, : len(tokens)] = [not lane.ran for lane in tokens]
            active[slot, : len(tokens)] = [lane.active for lane in tokens]
        state.put(LANES + "first_loop", first_loop)
        self._control = LoopControl(first_loop, active, lengths.copy(), counts)
        _, context = state.begin_loops(self._control)

        def work() -> None:
            key = ("loop_step", width, context)
            state.run_bound(key, lambda: loop_bindings(state.manifest, self.slots, width, context, 0))
            self._head(width)

        state.perform(("lanes", width, context), work)
        logits = state.view(LANES + "logits", FLOAT32, (self.slots, width, state.manifest.vocab_size))
        exits = state.view(LANES + "exit_probability", FLOAT32, (self.slots, width))
        return [
            [Read(logits[slot, column], exits[slot, column]) for column in range(len(tokens))]
            for slot, tokens in enumerate(lanes)
        ]

    def left(self, slot: int) -> None:
        """Copy a sequence's oldest token's keys and values into read-only caches, and begin with its next column."""
        self._first[slot] += 1
        counts = np.zeros(self.slots, np.int64)
        counts[slot] = self._first[slot]
        self._lanes.commit(replace(self._control, chunk_lengths=counts))

    def hidden(self, slot: int) -> NDArray[np.floating]:
        """Return a copy of the hidden states after the last run (see ``Lanes.hidden``)."""
        self._lanes.current, self._lanes.width = 1, self._width
        return self._lanes.read("hidden")[slot]  # type: ignore[no-any-return]

    def _keep(self, kept: Sequence[int], width: int) -> None:
        """Copy what the last run gave, of the tokens that stay, to where the next run, of ``width`` columns, reads."""
        for one in self._swapped:
            step = int(one.shape[-1]) * ITEM_BYTES[one.dtype]
            given, read = (LANES + buffer_name(one, which) for which in (1, 0))
            for slot, count in enumerate(kept):
                if count:
                    source = StridedRegion(given, (slot * self._width + self._first[slot]) * step, count * step)
                    target = StridedRegion(read, slot * width * step, count * step)
                    self._lanes.copy(target, source, count * step, 1)

    def _enter(self, lanes: Sequence[Sequence[Lane]], kept: Sequence[int], width: int) -> None:
        """Embed the new tokens behind those that stay."""
        state, hidden = self._lanes, self.state.hidden
        entering = [slot for slot, tokens in enumerate(lanes) if len(tokens) > kept[slot]]
        if not entering:
            return
        given, read = (buffer_name(hidden, which) for which in (1, 0))

        def bindings() -> Bindings:
            inputs, outputs = embed_bindings(state.manifest, self.slots, 1)
            return inputs, tuple(replace(one, buffer=given) for one in outputs)

        state.put(LANES + "input_ids", new_tokens(lanes)[:, None])
        state.perform(("embed",), lambda: state.run_bound(("embed",), bindings))
        step = int(hidden.shape[-1]) * ITEM_BYTES[hidden.dtype]
        for slot in entering:
            target = StridedRegion(LANES + read, (slot * width + kept[slot]) * step, step)
            state.copy(target, StridedRegion(LANES + given, slot * step, step), step, 1)

    def _head(self, width: int) -> None:
        """Run the head on all tokens, as a batch."""
        state, given = self._lanes, buffer_name(self.state.hidden, 1)
        try:
            state.batch = self.slots * width
            state.run_bound(("lm_head", width), lambda: state.head_bindings(given))
        finally:
            state.batch = self.slots
