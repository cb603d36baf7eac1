"""The state of a batch as all backends share it: its buffers, what is written into them, and the graphs run on them.

A backend implements the abstract methods of ``BufferState``: where buffers are allocated and how a graph runs.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..package.manifest import Manifest
from ..package.specs import CODA, ITEM_BYTES, StateSpec
from ..sampling.top_candidates import Candidates
from .bindings import (
    Binding,
    Bindings,
    buffer_name,
    cache_places,
    embed_bindings,
    head_bindings,
    loop_bindings,
    placed,
    rows_name,
    scratch_buffers,
    slot_bytes,
    state_buffers,
)
from .control import LoopControl
from .lanes_fit import why_no_lanes
from .positions import CachedPositions, StridedRegion, host_dtype

_MAX_BINDINGS, _MAX_LANE_BINDINGS = 32, 128
FLOAT32 = np.dtype(np.float32)


class BufferState(CachedPositions):
    """All state of a batch in named buffers. A cache has one, bound as input and output; hidden and latent have two.

    A subclass provides buffers and execution. Its constructor calls this one, which calls ``allocate`` once.
    """

    candidate_count = 0  # top candidates that the backend selects
    narrow_lanes = True  # whether lanes run for only the loops in which a token stands
    prefix = ""  # of the control and output buffers' names, for a state whose batch is lanes

    def __init__(self, manifest: Manifest, batch: int):
        self.manifest, self.batch, self.chunk = manifest, batch, manifest.chunk
        self.width = 1  # columns of the current chunk
        self.current = 0  # the swap buffer with the newest hidden and latent
        self.loops_run = 0  # loops of the current chunk; selects the caches if each loop has its own
        self.headed = False  # whether the head has run on the current chunk
        self.hidden = manifest.states[0]
        self._hidden_buffers = (buffer_name(self.hidden, 0), buffer_name(self.hidden, 1))
        inputs = {spec.name for spec in manifest.graphs["loop_step"].inputs}
        self.masked, self.steered = "attention_mask" in inputs, "active" in inputs
        self.after_coda = False  # whether the coda has run on the newest hidden; the other hidden buffer has its result
        self.first = 0  # a part's first sequence within the whole
        self.pitch = batch  # sequences per loop, in caches with a part for each loop
        self.places = cache_places(manifest, batch, 0, self.alignment)  # caches by name: buffer, bytes from its start
        sizes = state_buffers(manifest, batch, self.alignment)
        self.state_bytes = manifest.state_bytes(batch)
        self.read_only = [state for state in manifest.states if state.gives_rows]
        self.bindings: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self.lane_owner: list[object] = [None]  # what the lanes' buffers hold tokens of; shared by parts
        self.allocate({**sizes, **scratch_buffers(manifest, batch)})
        if self.steered:
            tokens = (batch, manifest.chunk) if manifest.staggers else batch
            self.put("first_loop/1", np.ones(tokens, np.bool_))

    @property
    @abstractmethod
    def computed_by(self) -> str:
        """The name of what computes the cache: the backend, and the engine if that runs instead of the graphs."""

    @abstractmethod
    def allocate(self, sizes: dict[str, int]) -> None:
        """Allocate all buffers, zeroed, with these sizes in bytes. Raises BackendError; then none are allocated."""

    @abstractmethod
    def stage(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return a host array for the front of a buffer, to be filled and passed on with ``send``."""

    @abstractmethod
    def send(self, buffer: str, count: int) -> None:
        """Copy the first ``count`` staged bytes to the buffer, unless the host array is the buffer."""

    @abstractmethod
    def view(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """Return a buffer's contents from ``offset`` bytes on, after all queued work; valid until the next call."""

    @abstractmethod
    def bind(self, graph: str, inputs: tuple[Binding, ...], outputs: tuple[Binding, ...]) -> Any:
        """Prepare a graph's run on these buffers; the result is reused."""

    @abstractmethod
    def run(self, graph: str, bound: Any) -> None:
        """Run a graph after all that was sent, copied and run before. Raises BackendError."""

    @abstractmethod
    def bucket(self, positions: int) -> int:
        """Round a number of cache positions up to one of a few attention lengths."""

    def part(self, first: int, count: int) -> Self | None:
        """Return sequences ``first`` to ``first + count - 1`` as a state over the same memory. Raises ArgumentError.

        Running it costs as much as ``count`` sequences and leaves the others' caches alone. The caches are the whole's,
        bound with an offset; all other buffers live for one chunk at most and are shared, so a part allocates nothing.
        Only one of whole and parts may run a chunk at a time. None where the backend cannot bind caches with an offset.
        """
        if first < 0 or count < 1 or first + count > self.batch:
            raise ArgumentError(f"slots {first} to {first + count - 1} are not among the {self.batch} of this state")
        places = self.places | {
            name: (self.places[name][0], self.places[name][1] + first * step)
            for name, step in slot_bytes(self.manifest).items()
        }
        made = self.over_same_memory(count, places)
        made.first = self.first + first
        return made

    def over_same_memory(self, batch: int, places: dict[str, tuple[str, int]]) -> Self:
        """Return a state of ``batch`` sequences over this one's buffers. ``places``: where its own lie, by name."""
        made = copy.copy(self)
        made.batch, made.places, made.bindings = batch, places, OrderedDict()
        made.width, made.current, made.loops_run, made.headed, made.after_coda = 1, 0, 0, False, False
        made.detach()
        return made

    def detach(self) -> None:
        """Give a state made by copying another what it must not share with that; here nothing."""

    def lanes_fit(self) -> str | None:
        """Return why one run cannot hold a token of every sequence in every loop, or None if it can."""
        return why_no_lanes(self.manifest, self.batch, self.first, self.pitch, self.alignment)

    def lane_outputs(self) -> tuple[str, ...]:
        """Return the names of further outputs of the head."""
        return ()

    def perform(self, key: tuple[Any, ...], work: Callable[[], None]) -> None:
        """Run several graphs on what was written before. Equal keys mean equal work."""
        work()

    def packed(self, pitch: int) -> Self:
        """Return the first ``pitch`` sequences as a state over the same memory, laid out side by side per loop."""
        made = self.over_same_memory(pitch, cache_places(self.manifest, pitch, 0, self.alignment))
        made.pitch = pitch
        return made

    def embed(
        self,
        token_ids: NDArray[np.int64],
        control: LoopControl | None = None,
        start: NDArray[np.float32] | None = None,
    ) -> None:
        """Embed token_ids (batch, chunk) and set the hidden state before the first loop.

        ``control``: of the first loop; needed where layers run before the loops. ``start``: the hidden state (batch,
        chunk, d); None: what the embedding gives.
        """
        self.width, self.current, self.loops_run, self.headed = token_ids.shape[1], 0, 0, False
        self.after_coda, context = False, 0
        self.put("input_ids", token_ids)
        self.put_start(start)
        if self.manifest.has_prelude:
            assert control is not None
            _, context = self.begin_loops(control)
        self.run_embed(context)
        self.begin_hidden(start is not None)

    def put_start(self, start: NDArray[np.float32] | None) -> None:
        """Write a start state (batch, chunk, d), if there is one, before the embedding runs."""
        if start is not None:
            self.put("start", narrowed(start, self.hidden.dtype))

    def begin_hidden(self, started: bool) -> None:
        """Fill the hidden buffer of a package whose loops also read what is injected, after the embedding.

        ``started``: from what ``put_start`` wrote; else from what is injected.
        """
        if self.manifest.injects:
            whole = self.batch * self.width * int(self.hidden.shape[-1]) * ITEM_BYTES[self.hidden.dtype]
            source = StridedRegion("start" if started else "injected", 0, whole)
            self.copy(StridedRegion(self._hidden_buffers[0], 0, whole), source, whole, 1)

    def loop(self, control: LoopControl) -> NDArray[np.float32] | None:
        """Run one loop step and swap hidden and latent. Return the exit probability (batch, chunk), valid until the
        next call; None without an exit gate."""
        self.run_loop(*self.prepare(control))
        return self._exits() if self.manifest.has_exit_gate else None

    def coda(self, control: LoopControl) -> None:
        """Run what stands between the last loop and the head, if anything does; ``control`` is that of a loop which
        has run. The hidden state stays, so that loops may follow."""
        if self.manifest.has_coda and not self.after_coda:
            self.run_coda(control.active.shape[1], self.context(control))

    def run_chunk(
        self,
        token_ids: NDArray[np.int64],
        control: LoopControl,
        loops: int,
        head: bool,
        between: Callable[[], None] | None = None,
        start: NDArray[np.float32] | None = None,
    ) -> None:
        """Run ``embed``, ``loops`` loop steps, the coda and ``commit`` without decisions in between. ``control`` is the
        first loop's; ``start`` as in ``embed``. ``between``: called between loops that are launched one by one; an
        exception in it ends the chunk, whose positions then do not count.

        ``head``: a hint that logits are needed next. For one token the head then runs at once: after each graph the
        processor's caches are full of weights, so any work between two graphs takes several times longer.
        """
        self.embed(token_ids, control, start)
        width, context = self.begin_loops(control)
        for loop in range(loops):
            if loop and between is not None:
                between()
            self.run_loop(width, context, "first_loop/0" if loop else "first_loop/1")
        if self.manifest.has_coda:
            self.run_coda(width, context)
        if head and width == 1:
            self.run_head()
            self.headed = True
        if self.read_only:
            self.commit(control)

    def logits(self, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits of columns (batch, n) of the chunk as (batch, n, vocab), valid until the next call."""
        if columns.shape[1] > 1:
            return self.logits_of_many(columns)
        if not self.headed:
            self.gather(columns[:, 0])
            self.run_head()
        return self.view("logits", FLOAT32, (self.batch, 1, self.manifest.vocab_size))

    def logits_of_many(self, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return logits as ``logits`` does, for several columns."""
        return np.concatenate([self.logits(column[:, None]).copy() for column in columns.T], axis=1)

    def candidates(self, columns: NDArray[np.int64]) -> list[Candidates] | None:
        """Return the top candidates after columns (batch, 1), one per sequence; here None, because all logits are cheap
        to read."""
        return None

    def exit_probability(self) -> NDArray[np.float32] | None:
        """Return a copy of the last loop step's exit probability (batch, chunk); None without an exit gate."""
        return self._exits().copy() if self.manifest.has_exit_gate else None

    def read(self, name: str, index: Any = ...) -> NDArray[Any]:
        """Return a copy of a state, or of its part at ``index``, by its name in the manifest; bfloat16 is returned as
        float32.

        An input name gives the state: hidden (batch, chunk, d), latent (layers, batch, chunk, d), a cache (batch,
        kv_heads, positions, head_dim), a LoopLM's with the loop as first axis. The output name of a read-only cache
        gives the chunk's new positions, likewise.
        """
        axes = index if isinstance(index, tuple) else (index,)
        which, rest = (axes[0], axes[1:]) if axes else (..., ())
        latents = [state for state in self.manifest.states if state.input.startswith("latent.")]
        if name == "latent" and latents:
            return _joined(lambda layer: self.read(latents[layer].input, rest), len(latents), which)
        for state in self.manifest.states:
            rows = name == state.output and state.gives_rows
            if not rows and name != state.input:
                continue
            shape = state.output_shape if rows else state.bound_shape
            if not state.by_loop:
                buffer = name if rows else buffer_name(state, self.current)
                return self._read(buffer, shape, state.dtype, index)

            def of_loop(loop: int, state: StateSpec = state, rows: bool = rows) -> NDArray[Any]:
                buffer = rows_name(state, loop) if rows else buffer_name(state, 0, loop)
                return self._read(buffer, state.output_shape if rows else state.bound_shape, state.dtype, rest)

            return _joined(of_loop, int(state.shape[0]), which)
        raise ArgumentError(f"the package has no state {name!r}")

    def put(self, buffer: str, values: NDArray[Any]) -> None:
        """Write an array to the front of a buffer."""
        self.stage(buffer, values.dtype, values.shape)[...] = values
        self.send(buffer, values.nbytes)

    def prepare(self, control: LoopControl) -> tuple[int, int, str]:
        """Write the control inputs of a loop. Return chunk width, attention length and the buffer of ``first_loop``.

        Lengths and mask are the same for all loops of a chunk, so they are written for the first only; where tokens are
        in different loops, they are written always.
        """
        first, name = control.first_loop, "first_loop"
        alike = set(first.ravel().tolist())
        if True in alike or first.ndim > 1:
            width, context = self.begin_loops(control)
        else:
            width, context = control.active.shape[1], self.context(control)
            if self.steered:
                self.put("active", control.active)
        if len(alike) == 1 or not self.steered:
            name = f"first_loop/{int(True in alike)}"
        elif self.manifest.staggers and first.ndim == 1:
            self.put(name, np.repeat(first[:, None], width, axis=1))
        else:
            self.put(name, first)
        return width, context, name

    def begin_loops(self, control: LoopControl) -> tuple[int, int]:
        """Write the control inputs of a chunk's first loop. Return its width and attention length."""
        width, context = control.active.shape[1], self.context(control)
        self.put(self.prefix + "lengths", control.lengths)
        if self.masked:
            self._write_mask(control, width, context)
        else:
            self.put(self.prefix + "chunk_lengths", control.chunk_lengths)
        if self.steered:
            self.put(self.prefix + "active", control.active)
        return width, context

    def run_embed(self, context: int = 0) -> None:
        """Run the embedding on the token ids in their buffer. ``context``: the attention length of a prelude."""
        key = ("embed", self.width, context)
        bound = self.bindings.get(key)
        if bound is None:
            bound = self._bind(key, embed_bindings(self.manifest, self.batch, self.width, context))
        self.run("embed", bound)

    def run_coda(self, width: int, context: int) -> None:
        """Run the coda from the newest hidden buffer to the other one."""
        key = (CODA, self.current, width, context)
        bound = self.bindings.get(key)
        if bound is None:
            bound = self._bind(key, loop_bindings(self.manifest, self.batch, width, context, self.current, step=CODA))
        self.run(CODA, bound)
        self.after_coda, self.headed = True, False

    def run_loop(self, width: int, context: int, first_loop: str) -> None:
        """Run a loop step with what ``prepare`` wrote, and swap hidden and latent."""
        loop = self.loops_run if self.manifest.cache_loops else 0
        key = ("loop_step", self.current, width, context, first_loop, loop)
        bound = self.bindings.get(key)
        if bound is None:
            made = loop_bindings(self.manifest, self.batch, width, context, self.current, first_loop, loop)
            bound = self._bind(key, made)
        self.run("loop_step", bound)
        self.current = 1 - self.current
        self.after_coda = False
        self.loops_run += 1

    @property
    def head_source(self) -> str:
        """The buffer that the head reads: the newest hidden state, or what the coda made of it."""
        return self._hidden_buffers[1 - self.current if self.after_coda else self.current]

    def gather(self, columns: NDArray[np.int64]) -> None:
        """Copy one column (batch,) of each sequence's hidden together for the head; not needed for a single column."""
        if self.width == 1:
            return
        step = int(self.hidden.shape[-1]) * ITEM_BYTES[self.hidden.dtype]
        for slot, column in enumerate(columns.tolist()):
            source = StridedRegion(self.head_source, (slot * self.width + column) * step, step)
            self.copy(StridedRegion("head_hidden", slot * step, step), source, step, 1)

    def run_head(self) -> None:
        """Run the head on the gathered columns."""
        source = self.head_source if self.width == 1 else "head_hidden"
        key = ("lm_head", source)
        bound = self.bindings.get(key) or self._bind(key, self.head_bindings(source))
        self.run("lm_head", bound)

    def head_bindings(self, hidden: str) -> Bindings:
        """Bind the head to one column per sequence in a buffer."""
        return head_bindings(self.manifest, self.batch, hidden)

    def context(self, control: LoopControl) -> int:
        """Return the number of cache positions that attention reads, in dialects with a mask; else 0."""
        if not self.masked:
            return 0
        own = 0 if self.manifest.dialect == "portable" else control.active.shape[1]
        return self.bucket(min(max(int(control.lengths.max()) + own, 1), self.manifest.cache_rows))

    def _write_mask(self, control: LoopControl, width: int, context: int) -> None:
        """Write the attention mask (batch, 1, chunk, context). In the portable dialect it does not cover the chunk
        itself."""
        name = self.prefix + "attention_mask"
        mask = self.stage(name, np.dtype(np.bool_), (self.batch, 1, width, context))
        position = np.arange(context)
        seen = np.repeat(control.lengths[:, None], width, axis=1)
        if self.manifest.dialect != "portable":
            seen = seen + np.arange(1, width + 1)
        np.less(position, seen[:, None, :, None], out=mask)
        self.send(name, mask.nbytes)

    def _exits(self) -> NDArray[np.float32]:
        return self.view("exit_probability", FLOAT32, (self.batch, self.width))

    def _read(self, buffer: str, shape: tuple[int | str, ...], dtype: str, index: Any) -> NDArray[Any]:
        sizes = {"batch": self.batch, "chunk": self.width}
        dims = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)
        block, offset = self.places.get(buffer, (buffer, 0))
        values = self.view(block, host_dtype(dtype), dims, offset)[index]
        return widened(values) if dtype == "bfloat16" else values.copy()

    def run_bound(self, key: tuple[Any, ...], bindings: Callable[[], Bindings]) -> None:
        """Run the graph that a key begins with, on the bindings that ``bindings`` makes at the key's first use."""
        self.run(key[0], self.bindings.get(key) or self._bind(key, bindings()))

    def _bind(self, key: tuple[Any, ...], bindings: Bindings) -> Any:
        self.bindings[key] = bound = self.bind(key[0], *placed(bindings, self.places))
        if len(self.bindings) > (_MAX_LANE_BINDINGS if self.prefix else _MAX_BINDINGS):
            self.bindings.popitem(last=False)
        return bound


def _joined(read: Callable[[int], NDArray[Any]], count: int, which: Any) -> NDArray[Any]:
    """Return the parts that an index of the first axis picks, one on the other; a single number picks its part."""
    chosen = np.arange(count)[which]
    parts = [read(int(part)) for part in np.atleast_1d(chosen)]
    return np.stack(parts) if np.ndim(chosen) else parts[0]


def narrowed(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round float32 values to a tensor type, to even; for bfloat16 return the bits."""
    if dtype != "bfloat16":
        return values.astype(dtype, copy=False)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Convert bfloat16 bits to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
