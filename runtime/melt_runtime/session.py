"""A session: the state of one batch of sequences, and the loop driver that moves it forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .backends import BackendState, LoopControl
from .errors import ArgumentError, PromptError
from .package import Manifest


@dataclass(frozen=True)
class LoopSettings:
    """How deep to think: at most ``loops`` loops a token, fewer once the cumulative exit probability reaches
    ``exit_threshold`` (1.0 never leaves early). Raises ArgumentError."""

    loops: int
    exit_threshold: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.loops, bool) or not isinstance(self.loops, int) or self.loops < 1:
            raise ArgumentError(f"loops is {self.loops!r}; it must be a whole number from 1")
        if not 0.0 <= self.exit_threshold <= 1.0:
            raise ArgumentError(f"exit_threshold is {self.exit_threshold!r}; it must lie between 0 and 1")


class Session:
    """Sequences whose tokens lie in the cache. All memory is allocated when the session opens and never grows.

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
        arrays = self._check(tokens)
        counts = np.array([len(array) for array in arrays], np.int64)
        logits = np.zeros((self.batch, self.manifest.vocab_size), np.float32)
        for start in range(0, int(counts.max(initial=0)), self.manifest.chunk):
            here = np.clip(counts - start, 0, self.manifest.chunk)
            width = int(here.max())
            ids = np.zeros((self.batch, width), np.int64)
            for slot, array in enumerate(arrays):
                ids[slot, : here[slot]] = array[start : start + width]
            self.run_chunk(ids, here, settings)
            finished = (here > 0) & (start + here == counts)
            if finished.any():
                last = self.state.logits(np.maximum(here - 1, 0)[:, None])[:, 0]
                logits[finished] = last[finished]
        return logits

    def run_chunk(self, ids: NDArray[np.int64], counts: NDArray[np.int64], settings: LoopSettings) -> None:
        """All loops of one chunk. ids (batch, width), right-padded; counts (batch,) real tokens in each row.

        A token leaves the loop once 1 - prod(1 - exit probability) reaches the threshold; its hidden and latent
        are frozen from then on, so that its cache rows keep their values. The chunk stops when all have left.
        """
        valid = np.arange(ids.shape[1]) < counts[:, None]
        active, remaining = valid, np.ones(ids.shape, np.float32)
        depth = np.zeros(ids.shape, np.int64)
        control = LoopControl(np.ones(self.batch, np.bool_), active, self.lengths, counts)
        self.state.embed(ids)
        for loop in range(settings.loops):
            control = LoopControl(np.full(self.batch, loop == 0), active, self.lengths, counts)
            exit_probability = self.state.loop(control)
            depth += active
            if settings.exit_threshold < 1.0:
                remaining = remaining * (np.float32(1) - exit_probability)
                active = active & ~((np.float32(1) - remaining) >= settings.exit_threshold)
                if not active.any():
                    break
        self.state.commit(control)
        self.lengths += counts
        for slot, count in enumerate(counts):
            self.depth[slot].extend(depth[slot, :count].tolist())

    def _check(self, tokens: Sequence[Sequence[int]]) -> list[NDArray[np.int64]]:
        if len(tokens) != self.batch:
            raise PromptError(f"the session has {self.batch} sequences, tokens were given for {len(tokens)}")
        arrays = [np.asarray(ids, np.int64).reshape(-1) for ids in tokens]
        for slot, array in enumerate(arrays):
            room = self.capacity - int(self.lengths[slot])
            if len(array) > room:
                raise PromptError(f"{len(array)} tokens do not fit: the cache has room for {room} of {self.capacity}")
            wrong = array[(array < 0) | (array >= self.manifest.vocab_size)]
            if len(wrong):
                raise PromptError(f"token id {wrong[0]} is outside the vocabulary of {self.manifest.vocab_size}")
        return arrays
