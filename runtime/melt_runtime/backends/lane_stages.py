"""The stages around lanes: new tokens enter through the prelude, and all in flight are read by the coda.

The prelude runs once per token, and what it gives moves with the token from lane to lane. The coda takes a sequence's
tokens in flight as one chunk, behind those in the cache. So the oldest token, where it has run all its loops, reads
final tokens only. What the others write into the coda's caches is written over by every run until they are the oldest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..package.specs import CODA, ITEM_BYTES, PRELUDE
from .bindings import LANES, Bindings, buffer_name, embed_bindings, lane_buffers
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


class Read(NamedTuple):
    """What a run says of a token: the head's logits (vocab,), and the loop's exit probability."""

    logits: NDArray[np.float32]
    exit_probability: np.float32


def lane_names(state: BufferState) -> tuple[str, ...]:
    """Return the names of a state's buffers for lanes."""
    return (*lane_buffers(state.manifest, state.batch), *(LANES + more for more in state.lane_outputs()))


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
    """Embeds the new tokens of all sequences, at most one each, and begins their loops."""

    def __init__(self, state: BufferState, names: Sequence[str]):
        self._state, self._injects = lane_state(state, names, f"{LANES}{PRELUDE}/"), state.manifest.injects
        self._state.steered = False  # the prelude freezes no tokens
        self._around = self._state.places  # where everything but the embedding's outputs lies
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

    def run(self, which: int = 0, row: int = 0, injected: int = 0) -> None:
        """Run the embedding, with the prelude, and set the hidden states before the first loop.

        Hidden states go to the lanes' swap buffer ``which``, from ``row`` on; what is injected into the loops goes to
        its buffer, from row ``injected`` on.
        """
        state, context, step = self._state, self._context, self._step
        target = LANES + buffer_name(state.hidden, which)

        def bindings() -> Bindings:
            hidden, given = (target, row * step), (LANES + "injected", injected * step)
            state.places = self._around | {buffer_name(state.hidden, 0): hidden, "injected": given}
            return embed_bindings(state.manifest, state.batch, 1, context)

        where = (context, which, row, injected)
        state.perform((PRELUDE, *where), lambda: state.run_bound(("embed", *where), bindings))
        if self._control is not None:
            state.commit(self._control, PRELUDE)
        if not self._injects:
            return
        if len(self._starts) < state.batch:
            self._copy(target, row, LANES + "injected", injected, state.batch)
        for slot in self._starts:
            self._copy(target, row + slot, LANES + "start", slot, 1)

    def move(self, source: int, target: int, count: int) -> None:
        """Move what is injected: ``count`` rows from row ``source`` on to row ``target`` on."""
        if self._injects and count:
            # Not in place: no backend copies between overlapping regions.
            self._copy(LANES + "injected/moved", source, LANES + "injected", source, count)
            self._copy(LANES + "injected", target, LANES + "injected/moved", source, count)

    def _copy(self, to: str, row: int, of: str, first: int, count: int) -> None:
        """Copy rows from one buffer to another."""
        size = count * self._step
        self._state.copy(
            StridedRegion(to, row * self._step, size), StridedRegion(of, first * self._step, size), size, 1
        )


class Reading:
    """Reads the hidden states of a LoopLM's tokens in flight by the coda and the head."""

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
        try:
            state.batch = self._slots * width
            read = buffer_name(state.hidden, 1)
            state.run_bound(("lm_head", width), lambda: state.head_bindings(read))
        finally:
            state.batch = self._slots
