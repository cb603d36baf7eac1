"""The loop driver: runs tokens through the loops and keeps the state of a batch of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.buffers import BufferState
from ..backends.control import LoopControl
from ..errors import ArgumentError, PromptError
from ..package.manifest import Manifest
from .cached_tokens import CachedTokens
from .chunking import Chunk, checked_ids, cut, make_chunk
from .early_exit import Depth
from .next_logits import NextLogits
from .pipeline import Advancing, Pipeline, PipelineCounts, Pipelining, cannot_pipeline, may_pipeline
from .pipeline_choice import PipelineChoice
from .settings import GenerationOptions, LoopSettings
from .start import start_hidden

Settings = LoopSettings | Sequence[LoopSettings]  # for all sequences, or one per sequence
# Called between loops with the active sequences (batch,), None: all. May raise Interrupted to end the call.
Between = Callable[..., None]
_LAUNCHED = 4  # with more than this times the package's loops, loops are launched one by one if ``between`` is given


class Interrupted(Exception):
    """An exception raised between loops when a call's tokens are no longer wanted. The sequences are as before the
    call."""


class LoopDriver:
    """A batch of sequences and their state. All memory is allocated at the start and never grows.

    ``lengths``, ``versions`` (batch,): those of ``cached``, the tokens in the caches. An exception at any place leaves
    every sequence with the tokens that its length counts. ``whole``: the driver of which this one is a part that begins
    at sequence ``first``. ``choice``: whether pipelined decoding is the faster way, shared by drivers of one model. Not
    thread-safe.
    """

    def __init__(
        self,
        state: BufferState,
        manifest: Manifest,
        whole: LoopDriver | None = None,
        first: int = 0,
        choice: PipelineChoice | None = None,
    ):
        self.state, self.manifest = state, manifest
        self.choice: PipelineChoice = choice or (PipelineChoice() if whole is None else whole.choice)
        self.batch, self.capacity = state.batch, manifest.max_seq_len
        self.cached: CachedTokens = CachedTokens(
            self.batch, self.capacity, None if whole is None else whole.cached, first
        )
        self.lengths, self.versions = self.cached.lengths, self.cached.versions
        self.moves = 0  # counts changes, so that a caller notices another's use of the driver
        # Reused for chunks of one token, where every microsecond counts.
        self._all, self._one = np.ones(self.batch, np.bool_), np.ones(self.batch, np.int64)
        self._column, self._zeros = self._all[:, None], np.zeros((self.batch, 1), np.int64)
        self._ids = np.zeros((self.batch, 1), np.int64)
        # Memory: reading and writing an element is fast here.
        self._lengths, self._versions, self._loops = self.lengths.data, self.versions.data, self.cached.loops.data
        self._each_one = Chunk(self._ids, self._one, self._all, self._column)
        self._steady = LoopControl(self._all, self._column, self.lengths, self._one)
        self._fixed: LoopSettings | None = None  # settings already checked, with a fixed number of loops
        self._checked: list[int] = []  # a LoopLM's versions at which every sequence's caches are as deep as those
        self._drafted: LoopSettings | None = None  # settings already checked for pipelined decoding after these tokens
        self._injects, self._looplm = manifest.injects, manifest.cache_loops is not None

    @cached_property
    def pipeline(self) -> Pipeline | None:
        """Pipelined decoding of these sequences; None where ``state.lanes_fit`` says why not."""
        return Pipeline(self) if self.state.lanes_fit() is None else None

    def begin_pipeline(self, options: GenerationOptions) -> PipelineCounts | None:
        """Begin a request of the only sequence. Return the counts of its pipelined tokens; None: none is pipelined.

        Raises ArgumentError if they must be and cannot.
        """
        if not may_pipeline(self.manifest, options):
            return None
        if self.batch > 1 or self.pipeline is None:
            if options.pipeline == "on":
                why = "several prompts run at once" if self.batch > 1 else self.state.lanes_fit()
                raise cannot_pipeline(str(why))
            return None
        counts = PipelineCounts(self.pipeline.lanes.window)
        self.pipeline.begin(0, counts)
        return counts

    @property
    def depth(self) -> list[list[int]]:
        """Per sequence, the loops run for each of its tokens: a copy."""
        return [self.cached.depth(slot) for slot in range(self.batch)]

    def last_depth(self, slot: int) -> int:
        """Return the loops run for the last token of one sequence."""
        return self._loops[slot, self._lengths[slot] - 1]

    def reset(self) -> None:
        """Drop all tokens; the buffers stay allocated."""
        for slot in range(self.batch):
            self.clear(slot)

    def clear(self, slot: int) -> None:
        """Drop the tokens of one sequence."""
        self.moves += 1
        self.cached.keep(slot, 0)

    def assume(self, slot: int, count: int, loops: int) -> None:
        """Give one sequence ``count`` tokens that did not run, for measurements: what the caches hold takes no time."""
        self.clear(slot)
        self.cached.add(slot, [loops] * count)

    def room(self, slot: int) -> int:
        """Return how many more tokens of one sequence fit."""
        return self.capacity - self._lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        """Keep the first ``length`` tokens of one sequence."""
        if not 0 <= length <= self.lengths[slot]:
            raise ArgumentError(f"length is {length}; it must lie between 0 and the {self.lengths[slot]} in the cache")
        self.moves += 1
        self.cached.keep(slot, length)

    def restore(self, slot: int, positions: Mapping[str, NDArray[Any]], depth: Sequence[int]) -> None:
        """Append tokens to one sequence without running them. Raises ArgumentError for positions that do not fit.

        ``positions``: what ``state.read_positions`` returned for the same tokens at the same place. ``depth``: loops
        per token.
        """
        start = int(self.lengths[slot])
        if any(values.ndim != 3 or values.shape[1] != len(depth) for values in positions.values()):
            raise ArgumentError(f"the positions are not those of {len(depth)} tokens")
        if start + len(depth) > self.capacity:
            raise ArgumentError(f"{len(depth)} tokens do not fit behind {start} in a cache of {self.capacity}")
        self.moves, self._drafted = self.moves + 1, None
        self.cached.change(slot)
        if depth:
            self.state.write_positions(slot, start, positions)
        self.cached.add(slot, depth)

    def part(self, first: int, count: int) -> LoopDriver | None:
        """Return a driver of sequences ``first`` to ``first + count - 1`` that shares memory, lengths and depths with
        this one.

        Only one of the two may run at a time. None where the backend does not support it.
        """
        state = self.state.part(first, count)
        if state is None:
            return None
        return LoopDriver(state, self.manifest, self, first)

    def packed(self, count: int) -> LoopDriver:
        """Return a driver of the first ``count`` sequences, whose caches lie side by side per loop (see ``move_to``).

        It shares memory, lengths and depths with this one, and only one of the two may be used: the other's caches lie
        elsewhere.
        """
        return LoopDriver(self.state.packed(count), self.manifest, self)

    def move_to(self, other: LoopDriver) -> None:
        """Move the sequences that both drivers have to the caches of the other, which shares memory with this one."""
        kept = min(self.batch, other.batch)
        self.versions += 1
        self.state.repack(other.state, self.lengths[:kept].tolist())

    def move(self, slot: int, to: int) -> None:
        """Move a sequence to another place in the batch, whose sequence is dropped."""
        self.moves += 1
        self.cached.keep(to, 0)
        self.state.move(slot, to, int(self.lengths[slot]))
        self.cached.move(slot, to)

    def append(self, tokens: Sequence[Sequence[int]], settings: Settings) -> NDArray[np.float32]:
        """Run new tokens of every sequence, in chunks. Return the logits after each sequence's last token (batch,
        vocab).

        ``settings``: for all sequences, or one per sequence; depth and chunk may differ, and each result is the same as
        if the sequence ran alone. A sequence without new tokens gets zeros. Raises PromptError, before any change, for
        token ids out of range or a sequence that does not fit; ArgumentError for settings that the package does not
        allow.
        """
        return self.advance(tokens, settings).full()

    def advance(
        self,
        tokens: Sequence[Sequence[int]],
        settings: Settings,
        between: Between | None = None,
        pipelining: Pipelining | None = None,
    ) -> NextLogits:
        """Run tokens as ``append`` does, but read logits only when they are needed.

        ``pipelining``: how a single token of the only sequence may be run, after ``begin_pipeline``.
        Raises Interrupted if ``between`` does; then nothing was appended.
        """
        logits = NextLogits(self.state, self.manifest.vocab_size)
        single = self._single(tokens)
        if pipelining is not None and single is self._each_one:
            self._decode(logits, settings, between, pipelining)
            return logits
        if single is self._each_one and self._again(settings, between):
            logits.follow(self._zeros, self._all)
            return logits
        self._advance(logits, tokens, single, settings, between)
        return logits

    def _decode(self, logits: NextLogits, settings: Settings, between: Between | None, pipelining: Pipelining) -> None:
        """Run the only sequence's token, already in ``_ids``, pipelined if that must be or is faster."""
        started = perf_counter()
        pipelined = pipelining.always or self.choice.pipelined(1)
        if pipelined:
            assert self.pipeline is not None
            [one] = self.each(settings)
            if one is not self._drafted:
                self._check_depth(self._each_one, [one])
                self._drafted = one
            row = self.pipeline.decode(int(self._ids[0, 0]), Advancing(one, pipelining.draft), between)
            logits.hold(0, row)
        elif self._again(settings, between):
            logits.follow(self._zeros, self._all)
        else:
            self._advance(logits, self._ids, self._each_one, settings, between)
        if not pipelining.always:
            self.choice.ran(1, pipelined, perf_counter() - started, 1)

    def _advance(
        self,
        logits: NextLogits,
        tokens: Any,
        single: Chunk | None,
        settings: Settings,
        between: Between | None,
    ) -> None:
        """Run tokens in chunks; ``single``: the only one, if known."""
        each = self.each(settings)
        before, self._drafted = self.lengths.tolist(), None
        try:
            for chunk in self.chunks(tokens, [one.chunk for one in each]) if single is None else (single,):
                for group in self._groups(chunk, each):
                    logits.keep()
                    self._run(group, each, between)
                    columns = self._zeros if group.ids.shape[1] == 1 else np.maximum(group.counts - 1, 0)[:, None]
                    logits.follow(columns, group.last)
        except Interrupted:
            for slot, length in enumerate(before):
                self.truncate(slot, length)
            raise

    def _again(self, settings: Settings, between: Between | None) -> bool:
        """Run one token per sequence, already in ``_ids``, with the settings of the last call. False if the settings
        differ.

        Between two tokens the weights have displaced everything else from the processor's caches, so fetching a
        function costs more than running it. This path therefore calls few functions.
        """
        fixed = self._fixed
        if fixed is None:
            return False
        if settings is not fixed and (isinstance(settings, LoopSettings) or settings.count(fixed) != self.batch):
            return False
        if self._looplm and self._checked != self.versions.tolist():
            return False
        start = self._start(self._each_one, [fixed] * self.batch) if self._injects else None
        self.moves += 1
        for slot in range(self.batch):
            self._versions[slot] += 1
        self.state.run_chunk(self._ids, self._steady, fixed.loops, True, between, start)
        for slot in range(self.batch):
            at = self._lengths[slot]
            self._loops[slot, at] = fixed.loops
            self._lengths[slot] = at + 1
        if self._looplm:
            self._checked = self.versions.tolist()
        return True

    def each(self, settings: Settings) -> Sequence[LoopSettings]:
        """Return one LoopSettings per sequence. Raises ArgumentError if their number differs from the batch."""
        if isinstance(settings, LoopSettings):
            return [settings] * self.batch
        if len(settings) != self.batch:
            raise ArgumentError(f"the batch has {self.batch} sequences, loop settings were given for {len(settings)}")
        return settings

    def chunks(self, tokens: Sequence[Sequence[int]], size: int | Sequence[int | None] | None = None) -> list[Chunk]:
        """Cut every sequence's new tokens into chunks. Raises PromptError, ArgumentError.

        ``size``: tokens per chunk, for all sequences or one per sequence; None: the package's.
        """
        sizes = [size] * self.batch if size is None or isinstance(size, int) else size
        most = np.array([self.manifest.chunk if one is None else one for one in sizes], np.int64)
        if most.max() > self.manifest.chunk:
            raise ArgumentError(f"chunk is {most.max()}; this package was exported for at most {self.manifest.chunk}")
        return cut(self.check(tokens), most)

    def _single(self, tokens: Sequence[Sequence[int]]) -> Chunk | None:
        """Return the chunk if no sequence has more than one new token; ``_each_one`` if each has one. None for anything
        else, invalid tokens included. The next call overwrites its ids."""
        if len(tokens) != self.batch:
            return None
        idle = 0
        try:
            for slot, new in enumerate(tokens):
                if not len(new):
                    idle += 1
                    continue
                if type(new) not in (list, tuple) or type(new[0]) is not int:
                    return None  # may be valid ids of another type; ``check`` decides
                token = new[0]
                if len(new) != 1 or not 0 <= token < self.manifest.vocab_size or self._lengths[slot] >= self.capacity:
                    return None
                self._ids[slot, 0] = token
        except TypeError:
            return None
        if not idle:
            return self._each_one
        if idle == self.batch:
            return None
        counts = np.array([len(new) for new in tokens], np.int64)
        self._ids[counts == 0] = 0
        return make_chunk(self._ids, counts, counts > 0)

    def loops(self, chunk: Chunk, settings: Settings, between: Between | None = None) -> Iterator[LoopControl]:
        """Run a chunk's loops, yield after each one, and commit the chunk's positions after the last.

        A token that has left keeps its hidden state and latent, and so its cached keys and values. The chunk ends when
        all tokens have left.
        """
        each = self.each(settings)
        self._check_depth(chunk, each)
        self._change(chunk)
        depth = Depth(each, chunk.present)
        control = LoopControl(self._all, depth.active, self.lengths, chunk.counts)
        self.state.embed(chunk.ids, control, self._start(chunk, each))
        while True:
            control = LoopControl(np.full(self.batch, depth.loop == 0), depth.active, self.lengths, chunk.counts)
            exit_probability = self.state.loop(control)
            depth.ran(exit_probability, lambda: self.state.read("hidden"), partial(self._first_logits, control))
            yield control
            if not depth.active.any():
                break
            if between is not None:
                between(depth.active.any(axis=1))
        self.state.coda(control)
        self.state.commit(control)
        self._count([row[:count] for row, count in zip(depth.spent.tolist(), chunk.counts.tolist(), strict=True)])  # type: ignore[call-overload]

    def _first_logits(self, control: LoopControl) -> NDArray[np.float32]:
        """Return what the head says of the first column after a loop, (batch, vocab)."""
        self.state.coda(control)
        return self.state.logits(self._zeros)[:, 0]

    def _start(self, chunk: Chunk, each: Sequence[LoopSettings]) -> NDArray[np.float32] | None:
        return start_hidden(self.manifest, each, self.lengths, chunk.counts) if self._injects else None

    def _run(self, chunk: Chunk, each: Sequence[LoopSettings], between: Between | None) -> None:
        """Run a chunk's loops: in one call of the backend if no decision between loops is needed."""
        counts = chunk.counts.tolist()
        asked = [settings for settings, count in zip(each, counts, strict=True) if count]
        decided = any(settings.adaptive for settings in asked) or len({settings.loops for settings in asked}) > 1
        if decided or (between is not None and asked[0].loops > _LAUNCHED * self.manifest.loops):
            for _ in self.loops(chunk, each, between):
                pass
            return
        self._check_depth(chunk, each)
        loops = asked[0].loops
        self._fixed = asked[0]
        self._change(chunk)
        control = LoopControl(self._all, chunk.present, self.lengths, chunk.counts)
        self.state.run_chunk(chunk.ids, control, loops, any(chunk.last.tolist()), between, self._start(chunk, each))
        self._count([[loops] * count for count in counts])
        self._checked = self.versions.tolist() if len(asked) == self.batch else []

    def _groups(self, chunk: Chunk, each: Sequence[LoopSettings]) -> list[Chunk]:
        """Split a LoopLM's chunk by number of loops, because its graph cannot freeze tokens. Other chunks stay
        whole."""
        if self.manifest.cache_loops is None:
            return [chunk]
        loops = np.array([settings.loops for settings in each])
        depths = np.unique(loops[chunk.counts > 0])
        if len(depths) == 1:
            return [chunk]
        groups = []
        for depth in depths:
            counts = np.where(loops == depth, chunk.counts, 0)
            groups.append(make_chunk(chunk.ids[:, : int(counts.max())], counts, chunk.last & (counts > 0)))
        return groups

    def _change(self, chunk: Chunk) -> None:
        """Note that a chunk is about to change the caches."""
        for slot, count in enumerate(chunk.counts.tolist()):
            # With a mask, a graph writes behind the last position of sequences without new tokens, too. A MELT's tokens
            # in flight do not mind: every run writes their keys and values anew.
            if count or (self.state.masked and self._looplm):
                self.cached.change(slot)

    def _count(self, spent: Sequence[Sequence[int]]) -> None:
        """Record a chunk as cached. ``spent``: per sequence, the loops run for each token."""
        self.moves += 1
        for slot, loops in enumerate(spent):
            if loops:
                self.cached.add(slot, loops)

    def commit(self, slot: int, loops: int) -> None:
        """Count one more token of a sequence, whose keys and values are in the cache of every loop."""
        self.moves += 1
        self.cached.add(slot, [loops])

    def _check_depth(self, chunk: Chunk, each: Sequence[LoopSettings]) -> None:
        """Raise ArgumentError if a LoopLM lacks a cache for a loop, or a cache lacks earlier tokens."""
        for slot, (settings, count) in enumerate(zip(each, chunk.counts.tolist(), strict=True)):
            if not count:
                continue
            settings.check(self.manifest)
            if self.manifest.cache_loops is None:
                continue
            filled = min(self.cached.depth(slot), default=settings.loops)
            if filled < settings.loops:
                raise ArgumentError(
                    f"loops is {settings.loops}, but tokens in the cache ran {filled}; "
                    "a LoopLM cannot deepen its caches"
                )
        if len(self._groups(chunk, each)) > 1:
            raise ArgumentError("sequences of a LoopLM run the same number of loops in a chunk")

    def check(self, tokens: Sequence[Sequence[int]]) -> list[NDArray[np.int64]]:
        """Return new tokens as arrays. Raises PromptError for token ids out of range or a sequence that does not
        fit."""
        if len(tokens) != self.batch:
            raise PromptError(f"the batch has {self.batch} sequences, tokens were given for {len(tokens)}")
        return [checked_ids(ids, self.room(slot), self.manifest) for slot, ids in enumerate(tokens)]
