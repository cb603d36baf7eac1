"""The loop driver: moves the state of one batch of sequences forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .backends import BackendState, LoopControl
from .errors import ArgumentError, PromptError
from .logits import NextLogits
from .package import Manifest


@dataclass(frozen=True)
class LoopSettings:
    """How deep to think: at most ``loops`` loops a token, fewer once the cumulative exit probability reaches
    ``exit_threshold`` (1.0 never leaves early). ``chunk`` is how many prompt tokens run their loops together (None:
    the package's): part of the model's meaning, so change it only on purpose. Raises ArgumentError."""

    loops: int
    exit_threshold: float = 1.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        whole_number("loops", self.loops)
        if self.chunk is not None:
            whole_number("chunk", self.chunk)
        if not isinstance(self.exit_threshold, float | int) or not 0.0 <= self.exit_threshold <= 1.0:
            raise ArgumentError(f"exit_threshold is {self.exit_threshold!r}; it must lie between 0 and 1")


def whole_number(name: str, value: object) -> None:
    """Raises ArgumentError unless ``value`` is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} is {value!r}; it must be a whole number from 1")


@dataclass(frozen=True)
class Chunk:
    """A slice of every sequence's new tokens: ids (batch, width) right-padded, counts (batch,) real tokens in each
    row, ``last`` (batch,) whether a sequence's last new token is in it."""

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]
    last: NDArray[np.bool_]


class LoopDriver:
    """Sequences whose tokens lie in the cache. All memory is allocated when it opens and never grows.

    ``lengths`` (batch,) counts each sequence's tokens in the cache; ``depth`` holds, a sequence, the loops spent on
    each of its tokens.
    """

    def __init__(self, state: BackendState, manifest: Manifest):
        self.state, self.manifest = state, manifest
        self.batch, self.capacity = state.batch, manifest.max_seq_len
        self.lengths = np.zeros(self.batch, np.int64)
        self.depth: list[list[int]] = [[] for _ in range(self.batch)]

    def reset(self) -> None:
        """Forgets all tokens; the buffers stay."""
        self.lengths[...] = 0
        self.depth = [[] for _ in range(self.batch)]

    def append(self, tokens: Sequence[Sequence[int]], settings: LoopSettings) -> NDArray[np.float32]:
        """Runs new tokens of every sequence, in chunks, and returns the logits after each one's last (batch, vocab).

        A sequence with no new tokens sits idle; its row of the result is zero. Raises PromptError, before anything
        is changed, if a sequence would not fit in the cache or a token id is out of range.
        """
        return self.advance(tokens, settings).full()

    def advance(self, tokens: Sequence[Sequence[int]], settings: LoopSettings) -> NextLogits:
        """As ``append``, but leaves the logits where they are until they are asked for."""
        logits = NextLogits(self.state, self.manifest.vocab_size)
        for chunk in self.chunks(tokens, settings.chunk):
            logits.keep()
            self._run(chunk, settings)
            logits.follow(np.maximum(chunk.counts - 1, 0)[:, None], chunk.last)
        return logits

    def chunks(self, tokens: Sequence[Sequence[int]], size: int | None = None) -> list[Chunk]:
        """Cuts every sequence's new tokens into chunks, each sequence from its own first. Raises PromptError."""
        size = self.manifest.chunk if size is None else size
        if size > self.manifest.chunk:
            raise ArgumentError(f"chunk is {size}; this package was exported for at most {self.manifest.chunk}")
        arrays = self.check(tokens)
        counts = np.array([len(array) for array in arrays], np.int64)
        chunks = []
        for start in range(0, int(counts.max(initial=0)), size):
            here = np.clip(counts - start, 0, size)
            ids = np.zeros((self.batch, int(here.max())), np.int64)
            for slot, array in enumerate(arrays):
                ids[slot, : here[slot]] = array[start : start + size]
            chunks.append(Chunk(ids, here, (here > 0) & (start + here == counts)))
        return chunks

    def loops(self, chunk: Chunk, settings: LoopSettings) -> Iterator[LoopControl]:
        """Runs a chunk's loops, yielding after each; when the last is over its rows are committed.

        A token leaves the loop once 1 - prod(1 - exit probability) reaches the threshold; its hidden and latent
        are frozen from then on, so that its cache rows keep their values. The chunk stops when all have left.
        """
        self._check_depth(settings)
        active = np.arange(chunk.ids.shape[1]) < chunk.counts[:, None]
        remaining, depth = np.ones(active.shape, np.float32), np.zeros(active.shape, np.int64)
        control = LoopControl(np.ones(self.batch, np.bool_), active, self.lengths, chunk.counts)
        self.state.embed(chunk.ids)
        for loop in range(settings.loops):
            control = LoopControl(np.full(self.batch, loop == 0), active, self.lengths, chunk.counts)
            exit_probability = self.state.loop(control)
            depth += active
            yield control
            if settings.exit_threshold < 1.0:
                remaining = remaining * (np.float32(1) - exit_probability)
                active = active & ~((np.float32(1) - remaining) >= settings.exit_threshold)
                if not active.any():
                    break
        self.state.commit(control)
        self._count(chunk, depth)

    def _run(self, chunk: Chunk, settings: LoopSettings) -> None:
        """A chunk's loops: all at once, where no token can leave early."""
        if settings.exit_threshold < 1.0:
            for _ in self.loops(chunk, settings):
                pass
            return
        self._check_depth(settings)
        active = np.arange(chunk.ids.shape[1]) < chunk.counts[:, None]
        control = LoopControl(np.ones(self.batch, np.bool_), active, self.lengths, chunk.counts)
        self.state.run_chunk(chunk.ids, control, settings.loops, head=bool(chunk.last.any()))
        self._count(chunk, active * settings.loops)

    def _count(self, chunk: Chunk, depth: NDArray[np.int64]) -> None:
        self.lengths += chunk.counts
        for slot, count in enumerate(chunk.counts):
            self.depth[slot].extend(depth[slot, :count].tolist())

    def _check_depth(self, settings: LoopSettings) -> None:
        """Raises ArgumentError where a LoopLM has no cache for a loop, or one that lacks earlier tokens' rows."""
        self.manifest.check_depth(settings.loops, settings.exit_threshold)
        filled = min((depth for depths in self.depth for depth in depths), default=settings.loops)
        if self.manifest.cache_loops is not None and filled < settings.loops:
            raise ArgumentError(
                f"loops is {settings.loops}, but tokens in the cache ran {filled}; a LoopLM cannot deepen its caches"
            )

    def check(self, tokens: Sequence[Sequence[int]]) -> list[NDArray[np.int64]]:
        """New tokens as arrays. Raises PromptError if one is out of range or a sequence would not fit."""
        if len(tokens) != self.batch:
            raise PromptError(f"the batch has {self.batch} sequences, tokens were given for {len(tokens)}")
        try:
            arrays = [np.asarray(ids, np.int64).reshape(-1) for ids in tokens]
        except (OverflowError, TypeError, ValueError) as error:
            raise PromptError("token ids must be whole numbers inside the vocabulary") from error
        for slot, array in enumerate(arrays):
            room = self.capacity - int(self.lengths[slot])
            if len(array) > room:
                raise PromptError(f"{len(array)} tokens do not fit: the cache has room for {room} of {self.capacity}")
            wrong = array[(array < 0) | (array >= self.manifest.vocab_size)]
            if len(wrong):
                raise PromptError(f"token id {wrong[0]} is outside the vocabulary of {self.manifest.vocab_size}")
        return arrays
