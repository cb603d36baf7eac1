"""The stages around a LoopLM's lanes: new tokens enter through the prelude, and all in flight are read by the coda.

The prelude runs once per token, and what it gives moves with the token from loop to loop. The coda takes a sequence's
tokens in flight as one chunk, behind those in the cache. So the oldest token, where it has run all its loops, reads
final tokens only. What the others write into the coda's caches is written over by every run until they are the oldest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..package.specs import CODA, ITEM_BYTES, PRELUDE
from .bindings import LANES, buffer_name
from .buffers import FLOAT32, BufferState, narrowed
from .control import LoopControl
from .positions import StridedRegion


class Lane(NamedTuple):
    """A token in flight: its id, the loops that it has run, and whether the next run changes it.

    ``start``: the hidden state (d,) that a new one's loops start from; None: what the embedding gives.
    """

    token: int
    ran: int
    active: bool = True
    start: NDArray[np.float32] | None = None


def lane_state(state: BufferState, names: Sequence[str], prefix: str = LANES) -> BufferState:
    """Return a state over the same memory, whose control inputs, hidden states and outputs are those of lanes.

    ``names``: the buffers of lanes. ``prefix``: of the names of those that it uses; ``LANES`` or a stage's.
    """
    places = state.places | {name.removeprefix(LANES): (name, 0) for name in names}
    places |= {name.removeprefix(prefix): (name, 0) for name in names if name.startswith(prefix)}
    made = state.over_same_memory(state.batch, places)
    made.prefix = prefix
    return made


def new_tokens(lanes: Sequence[Sequence[Lane]]) -> NDArray[np.int64]:
    """Return the ids of the tokens that have run no loop yet, one per sequence (slots,); 0 where there is none."""
    return np.array([tokens[-1].token if tokens and not tokens[-1].ran else 0 for tokens in lanes])


class Entrance:
    """Embeds the new tokens of all sequences, at most one each, into the lanes of the first loop."""

    def __init__(self, state: BufferState, names: Sequence[str]):
        self._state, self._injects = lane_state(state, names, f"{LANES}{PRELUDE}/"), state.manifest.injects
        self._size = int(state.hidden.shape[-1])
        self._step = self._size * ITEM_BYTES[state.hidden.dtype]
        self._context, self._starts = 0, list[int]()  # sequences whose hidden state is not what the embedding gives
        self._control: LoopControl | None = None

    def begin(self, lanes: Sequence[Sequence[Lane]], lengths: NDArray[np.int64]) -> None:
        """Write the inputs. ``lengths`` (slots,): tokens in the cache, before those in flight."""
        state = self._state
        entering = [tokens[-1] if tokens and not tokens[-1].ran else None for tokens in lanes]
        state.put(LANES + "input_ids", new_tokens(lanes))
        state.width, self._context = 1, 0
        if state.manifest.has_prelude:
            before = lengths + np.array([sum(lane.ran > 0 for lane in tokens) for tokens in lanes])
            present = np.array([one is not None for one in entering])
            self._control = LoopControl(present, present[:, None], before, present.astype(np.int64))
            _, self._context = state.begin_loops(self._control)
        self._starts = []
        if self._injects:
            starts = np.zeros((state.batch, self._size), np.float32)
            for slot, one in enumerate(entering):
                if one is not None and one.start is not None:
                    starts[slot] = one.start
                    self._starts.append(slot)
            state.put(LANES + "start", narrowed(starts, state.hidden.dtype))

    def run(self) -> None:
        """Run the embedding, with the prelude, and set the hidden states before the first loop."""
        state = self._state
        state.perform((PRELUDE, self._context), lambda: state.run_embed(self._context))
        if self._control is not None:
            state.commit(self._control, PRELUDE)
        if not self._injects:
            return
        target = LANES + buffer_name(state.hidden, 0)
        if len(self._starts) < state.batch:
            whole = state.batch * self._step
            state.copy(StridedRegion(target, 0, whole), StridedRegion(LANES + "injected", 0, whole), whole, 1)
        for slot in self._starts:
            at = slot * self._step
            source = StridedRegion(LANES + "start", at, self._step)
            state.copy(StridedRegion(target, at, self._step), source, self._step, 1)


class Reading:
    """Reads the hidden states of all tokens in flight by the coda and the head."""

    def __init__(self, state: BufferState, names: Sequence[str]):
        self._state = lane_state(state, names, f"{LANES}{CODA}/")
        self._slots, self._step = state.batch, int(state.hidden.shape[-1]) * ITEM_BYTES[state.hidden.dtype]
        self._cached = any(one.stage == CODA for one in state.manifest.caches)
        self._width = self._context = 0
        self._control: LoopControl | None = None
        self._rows: list[tuple[int, int]] = []  # of lanes and of the coda's chunks

    def begin(self, lanes: Sequence[Sequence[Lane]], lengths: NDArray[np.int64]) -> None:
        """Write the inputs of the next loop's end. ``lengths`` (slots,): tokens in the cache."""
        state, width = self._state, max(len(tokens) for tokens in lanes)
        counts = np.array([len(tokens) for tokens in lanes])
        self._width, self._context = width, 0
        if self._cached:
            present = np.arange(width) < counts[:, None]
            self._control = LoopControl(present[:, 0], present, lengths.copy(), counts)
            _, self._context = state.begin_loops(self._control)
        self._rows = [
            (lane.ran * self._slots + slot, slot * width + column)
            for slot, tokens in enumerate(lanes)
            for column, lane in enumerate(tokens)
        ]

    def run(self, hidden: str) -> NDArray[np.float32]:
        """Return the logits (slots, width, vocab). ``hidden``: the buffer of the lanes' hidden states after the loop,
        (loops, slots, d)."""
        state, width = self._state, self._width
        gathered = f"{LANES}{CODA}/{buffer_name(state.hidden, 0)}"
        for row, place in self._rows:
            source = StridedRegion(hidden, row * self._step, self._step)
            state.copy(StridedRegion(gathered, place * self._step, self._step), source, self._step, 1)

        def work() -> None:
            state.current, state.width = 0, width
            state.run_coda(width, self._context)
            self._head(width)

        state.perform((CODA, width, self._context), work)
        if self._control is not None:
            state.commit(self._control, CODA)
        return state.view(LANES + "logits", FLOAT32, (self._slots, width, state.manifest.vocab_size))

    def _head(self, width: int) -> None:
        """Run the head on all tokens, as a batch."""
        state = self._state
        state.batch = self._slots * width
        try:
            read = buffer_name(state.hidden, 1)
            state.run_bound(("lm_head", width), lambda: state.head_bindings(read))
        finally:
            state.batch = self._slots
