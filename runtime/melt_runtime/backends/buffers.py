"""What all backends share of a batch's state: which buffers there are, what is written into them, what is run on them.

A backend adds where the buffers lie and how a graph is run: the abstract methods of ``BufferState``, and no more.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..package.manifest import Manifest
from ..package.specs import ITEM_BYTES, StateSpec, new_positions_shape
from ..sampling.top_candidates import Candidates
from .base import LoopControl
from .bindings import (
    Binding,
    Bindings,
    behind,
    cache_buffers,
    embed_bindings,
    head_bindings,
    loop_bindings,
    moved,
    scratch_buffers,
    slot_bytes,
    state_buffers,
)

_MAX_BINDINGS = 32
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Strip:
    """Equal pieces of a buffer at equal distances, in bytes: where the first begins, and from one to the next."""

    buffer: str
    offset: int
    pitch: int


class BufferState(ABC):
    """All state of a batch in named buffers. Caches have one, bound as input and output; hidden and latent have two.

    A subclass gives the buffers and the execution. Its constructor calls this one, which calls ``allocate`` once.
    """

    likeliest = 0  # how many of the likeliest tokens the backend picks out

    def __init__(self, manifest: Manifest, batch: int):
        self.manifest, self.batch, self.chunk = manifest, batch, manifest.chunk
        self.width = 1  # columns of the chunk that was embedded last
        self.current = 0  # which of the two swap buffers holds the newest hidden and latent
        self.loops_run = 0  # of the open chunk: whose caches are bound next, where each loop has its own
        self.headed = False  # whether the head ran with the open chunk
        self.hidden = manifest.states[0]
        self._hidden_buffers = (behind(self.hidden, 0), behind(self.hidden, 1))
        self.masked = any(spec.name == "attention_mask" for spec in manifest.graphs["loop_step"].inputs)
        self.first = 0  # of a part: which of the whole's sequences is its first
        self.offsets: dict[str, int] = {}  # and where that one's caches begin in their buffers
        sizes = state_buffers(manifest, batch)
        self.state_bytes = sum(sizes.values())
        self._read_only = [state for state in manifest.states if state.kind == "read_only"]
        self._bindings: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self.allocate({**sizes, **scratch_buffers(manifest, batch)})
        self.put("first_loop/1", np.ones(batch, np.bool_))

    @property
    @abstractmethod
    def computed_by(self) -> str:
        """What computes the rows: the backend's name, and what it runs if that is not the package's graphs."""

    @abstractmethod
    def allocate(self, sizes: dict[str, int]) -> None:
        """Makes all buffers, zeroed, of so many bytes each; or none, and raises BackendError."""

    @abstractmethod
    def stage(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """A host array in which the front of a buffer is prepared, to be handed over with ``send``."""

    @abstractmethod
    def send(self, buffer: str, count: int) -> None:
        """Hands the first ``count`` bytes of what was staged over to the buffer; nothing where they are one."""

    @abstractmethod
    def view(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """What a buffer holds, when all that was run is done: from its front, or for a part from its first sequence's
        caches. Valid until the next call of any method."""

    @abstractmethod
    def copy(self, target: Strip, source: Strip, count: int, pieces: int) -> None:
        """Copies ``pieces`` pieces of ``count`` bytes from one buffer to another."""

    @abstractmethod
    def fetch(self, source: Strip, count: int, pieces: int) -> NDArray[np.uint8]:
        """``pieces`` pieces of ``count`` bytes of a buffer as an array of the host (pieces, count)."""

    @abstractmethod
    def store(self, target: Strip, values: NDArray[np.uint8]) -> None:
        """Writes pieces (pieces, count) of contiguous bytes into a buffer; afterwards the array is free again."""

    @abstractmethod
    def bind(self, graph: str, inputs: tuple[Binding, ...], outputs: tuple[Binding, ...]) -> Any:
        """What ``run`` needs to run a graph on these buffers; made once and used again."""

    @abstractmethod
    def run(self, graph: str, bound: Any) -> None:
        """Runs a graph, after all that was sent, copied and run before. Raises BackendError."""

    @abstractmethod
    def bucket(self, rows: int) -> int:
        """The attention length, one of few, that ``rows`` rows of the cache are rounded up to."""

    def part(self, first: int, count: int) -> Self | None:
        """The sequences ``first`` to ``first + count - 1`` as a state of their own, over the same memory.

        A chunk that is run on it costs what ``count`` sequences cost and leaves the others' caches alone. Caches
        outlive a chunk, so they are the whole's, bound further in. All else lives for one chunk at most, so the front
        of the whole's buffers serves: a part allocates nothing, and whole and parts take turns, a chunk at a time.
        None where the backend cannot bind the caches there. Raises ArgumentError for slots that are not there.
        """
        if first < 0 or count < 1 or first + count > self.batch:
            raise ArgumentError(f"slots {first} to {first + count - 1} are not among the {self.batch} of this state")
        made = copy.copy(self)
        made.first = self.first + first
        made.offsets = {name: made.first * step for name, step in slot_bytes(self.manifest).items()}
        made.batch, made.width, made.current, made.loops_run, made.headed = count, 1, 0, 0, False
        made._bindings = OrderedDict()
        return made

    def embed(self, token_ids: NDArray[np.int64]) -> None:
        """token_ids (batch, chunk) -> hidden."""
        self.width, self.current, self.loops_run, self.headed = token_ids.shape[1], 0, 0, False
        self.put("input_ids", token_ids)
        self.run_embed()

    def loop(self, control: LoopControl) -> NDArray[np.float32]:
        """One loop step over the chunk. Returns the exit probability (batch, chunk), valid until the next call."""
        self.run_loop(*self.prepare(control))
        return self._exits()

    def run_chunk(
        self,
        token_ids: NDArray[np.int64],
        control: LoopControl,
        loops: int,
        head: bool,
        between: Callable[[], None] | None = None,
    ) -> None:
        """A chunk from token ids to its last loop's rows in the cache, with nothing to decide on the way.

        ``control`` is the first loop's. ``head`` says whether logits are wanted next: only a hint. Of one token the
        head then runs at once: whatever comes between two graphs finds the processor's caches full of weights, and
        takes several times as long as it would in one go.
        """
        self.embed(token_ids)
        width, context = self._begin_loops(control)
        for loop in range(loops):
            if loop and between is not None:
                between()
            self.run_loop(width, context, "first_loop/0" if loop else "first_loop/1")
        if head and width == 1:
            self.run_head()
            self.headed = True
        if self._read_only:
            self.commit(control)

    def commit(self, control: LoopControl) -> None:
        """Copies the chunk's rows into read-only caches; the other dialects wrote them in the graph."""
        width = control.active.shape[1]
        for state in self._read_only:
            heads, rows, size = (int(dim) for dim in state.shape[1:])
            row = size * ITEM_BYTES[state.dtype]
            for slot, (at, count) in enumerate(
                zip(control.lengths.tolist(), control.chunk_lengths.tolist(), strict=True)
            ):
                if count:
                    begin = self.offsets.get(state.input, 0) + (slot * heads * rows + int(at)) * row
                    target = Strip(state.input, begin, rows * row)
                    source = Strip(state.output, slot * heads * width * row, width * row)
                    self.copy(target, source, int(count) * row, heads)

    def logits(self, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of columns (batch, n) of the chunk -> (batch, n, vocab), valid until the next call."""
        if columns.shape[1] > 1:
            return self.logits_of_many(columns)
        if not self.headed:
            self.gather(columns[:, 0])
            self.run_head()
        return self.view("logits", FLOAT32, (self.batch, 1, self.manifest.vocab_size))

    def logits_of_many(self, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """As ``logits``, for several columns."""
        return np.concatenate([self.logits(column[:, None]).copy() for column in columns.T], axis=1)

    def candidates(self, columns: NDArray[np.int64]) -> list[Candidates] | None:
        """None: whole rows of logits are in reach."""
        return None

    def exit_probability(self) -> NDArray[np.float32]:
        """A copy of what the last loop step returned, (batch, chunk)."""
        return self._exits().copy()

    def read(self, name: str, index: Any = ...) -> NDArray[Any]:
        """A copy of a state, or of the part at ``index``, by its name in the manifest; bfloat16 comes as float32.

        An input name gives the state itself: hidden (batch, chunk, d), latent (layers, batch, chunk, d), a cache
        (batch, kv_heads, rows, head_dim), a LoopLM's with the loops in front; the output name of a read-only cache
        gives the chunk's new rows.
        """
        for state in self.manifest.states:
            if name == state.input and state.kind == "per_loop":
                which, *rest = index if isinstance(index, tuple) else (index,)
                loops = np.arange(int(state.shape[0]))[which]
                parts = [
                    self._read(behind(state, 0, int(loop)), state.bound_shape, state.dtype, tuple(rest))
                    for loop in np.atleast_1d(loops)
                ]
                return np.stack(parts) if np.ndim(loops) else parts[0]
            if name == state.input:
                return self._read(behind(state, self.current), state.shape, state.dtype, index)
            if name == state.output and state.kind == "read_only":
                return self._read(name, new_positions_shape(state.shape), state.dtype, index)
        raise ArgumentError(f"the package has no state {name!r}")

    def read_positions(self, slot: int, start: int, stop: int, loops: int | None = None) -> dict[str, NDArray[Any]]:
        """A copy of the cache rows ``start`` to ``stop - 1`` of a sequence, by buffer (kv_heads, rows, head_dim).

        bfloat16 comes as its bits. ``loops``: of a LoopLM only the caches of so many. Between chunks only. Raises
        ArgumentError for rows that are not there.
        """
        found = {}
        for name, state in cache_buffers(self.manifest, loops).items():
            strip, heads, size = self._region_of(name, state, slot, start, stop)
            dtype = host_dtype(state.dtype)
            values = self.fetch(strip, (stop - start) * size * dtype.itemsize, heads)
            found[name] = values.view(dtype).reshape(heads, stop - start, size)
        return found

    def write_positions(self, slot: int, start: int, positions: Mapping[str, NDArray[Any]]) -> None:
        """Writes what ``rows`` gave into the cache rows of a sequence from ``start`` on. Raises ArgumentError, before
        anything is written, for names, types or shapes that are not this state's."""
        strips, known = [], cache_buffers(self.manifest)
        for name, values in positions.items():
            if name not in known or values.ndim != 3 or values.dtype != host_dtype(known[name].dtype):
                raise ArgumentError(f"{name!r} as {values.dtype} with {values.ndim} axes is no cache of this state")
            strip, heads, size = self._region_of(name, known[name], slot, start, start + values.shape[1])
            if values.shape[::2] != (heads, size):
                raise ArgumentError(f"{name} has the shape {values.shape}, not ({heads}, positions, {size})")
            strips.append((strip, np.ascontiguousarray(values).reshape(heads, -1).view(np.uint8)))
        for strip, values in strips:
            self.store(strip, values)

    def _region_of(self, buffer: str, state: StateSpec, slot: int, start: int, stop: int) -> tuple[Strip, int, int]:
        """Where rows of a sequence lie, a piece a head; heads and head size."""
        heads, rows, size = (int(dim) for dim in state.bound_shape[1:])
        if not (0 <= slot < self.batch and 0 <= start < stop <= rows):
            raise ArgumentError(
                f"positions {start} to {stop - 1} of slot {slot} are not among {rows} positions of {self.batch} slots"
            )
        row = size * ITEM_BYTES[state.dtype]
        begin = self.offsets.get(buffer, 0) + (slot * heads * rows + start) * row
        return Strip(buffer, begin, rows * row), heads, size

    def put(self, buffer: str, values: NDArray[Any]) -> None:
        """Writes an array to the front of a buffer."""
        self.stage(buffer, values.dtype, values.shape)[...] = values
        self.send(buffer, values.nbytes)

    def prepare(self, control: LoopControl) -> tuple[int, int, str]:
        """Writes what steers a loop. Returns its chunk width, attention length and the buffer of ``first_loop``.

        Lengths and mask are those of the chunk, so they are written for its first loop only.
        """
        first, name = control.first_loop, "first_loop"
        alike = set(first.tolist())
        if True in alike:
            width, context = self._begin_loops(control)
        else:
            width, context = control.active.shape[1], self.context(control)
            self.put("active", control.active)
        if len(alike) == 1:
            name = f"first_loop/{int(first[0])}"
        else:
            self.put(name, first)
        return width, context, name

    def _begin_loops(self, control: LoopControl) -> tuple[int, int]:
        """Writes what steers a chunk's first loop. Returns its width and attention length."""
        width, context = control.active.shape[1], self.context(control)
        self.put("lengths", control.lengths)
        if self.masked:
            self._write_mask(control, width, context)
        else:
            self.put("chunk_lengths", control.chunk_lengths)
        self.put("active", control.active)
        return width, context

    def run_embed(self) -> None:
        """The embedding, of the token ids in their buffer."""
        key = ("embed", self.width)
        bound = self._bindings.get(key) or self._bind(key, embed_bindings(self.manifest, self.batch, self.width))
        self.run("embed", bound)

    def run_loop(self, width: int, context: int, first_loop: str) -> None:
        """A loop step on what ``prepare`` wrote; hidden and latent trade places."""
        loop = self.loops_run if self.manifest.cache_loops else 0
        key = ("loop_step", self.current, width, context, first_loop, loop)
        bound = self._bindings.get(key)
        if bound is None:
            made = loop_bindings(self.manifest, self.batch, width, context, self.current, first_loop, loop)
            bound = self._bind(key, made)
        self.run("loop_step", bound)
        self.current = 1 - self.current
        self.loops_run += 1

    def gather(self, columns: NDArray[np.int64]) -> None:
        """Brings one column (batch,) of each sequence's hidden together for the head; a single one already is."""
        if self.width == 1:
            return
        row = int(self.hidden.shape[-1]) * ITEM_BYTES[self.hidden.dtype]
        for slot, column in enumerate(columns.tolist()):
            source = Strip(self._hidden_buffers[self.current], (slot * self.width + column) * row, row)
            self.copy(Strip("head_hidden", slot * row, row), source, row, 1)

    def run_head(self) -> None:
        """The head, on what ``gather`` brought together."""
        source = self._hidden_buffers[self.current] if self.width == 1 else "head_hidden"
        key = ("lm_head", source)
        bound = self._bindings.get(key) or self._bind(key, self.head_bindings(source))
        self.run("lm_head", bound)

    def head_bindings(self, hidden: str) -> Bindings:
        """The head's inputs and outputs, for one column of each sequence in a buffer."""
        return head_bindings(self.manifest, self.batch, hidden)

    def context(self, control: LoopControl) -> int:
        """How many rows of the cache the attention reads, for the dialects with a mask; else 0."""
        if not self.masked:
            return 0
        own = 0 if self.manifest.dialect == "portable" else control.active.shape[1]
        return self.bucket(min(max(int(control.lengths.max()) + own, 1), self.manifest.cache_rows))

    def _write_mask(self, control: LoopControl, width: int, context: int) -> None:
        """Who sees what: (batch, 1, chunk, context). In the portable dialect the chunk's own rows are not in it."""
        mask = self.stage("attention_mask", np.dtype(np.bool_), (self.batch, 1, width, context))
        row = np.arange(context)
        seen = np.repeat(control.lengths[:, None], width, axis=1)
        if self.manifest.dialect != "portable":
            seen = seen + np.arange(1, width + 1)
        np.less(row, seen[:, None, :, None], out=mask)
        self.send("attention_mask", mask.nbytes)

    def _exits(self) -> NDArray[np.float32]:
        return self.view("exit_probability", FLOAT32, (self.batch, self.width))

    def _read(self, buffer: str, shape: tuple[int | str, ...], dtype: str, index: Any) -> NDArray[Any]:
        sizes = {"batch": self.batch, "chunk": self.width}
        dims = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)
        values = self.view(buffer, host_dtype(dtype), dims)[index]
        return widened(values) if dtype == "bfloat16" else values.copy()

    def _bind(self, key: tuple[Any, ...], bindings: Bindings) -> Any:
        self._bindings[key] = bound = self.bind(key[0], *moved(bindings, self.offsets))
        if len(self._bindings) > _MAX_BINDINGS:
            self._bindings.popitem(last=False)
        return bound


def host_dtype(dtype: str) -> np.dtype[Any]:
    """numpy's type for a tensor's; bfloat16, which it lacks, as bits."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
