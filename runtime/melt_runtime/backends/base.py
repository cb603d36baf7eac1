"""The protocol of a backend. It owns buffers and execution, and knows nothing of the model's logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..sampling.top_candidates import Candidates


@dataclass(frozen=True)
class LoopControl:
    """The control inputs of one loop step over a chunk.

    ``first_loop`` (batch,) bool. ``active`` (batch, chunk) bool. ``lengths`` (batch,) int64: tokens in the cache before
    this chunk. ``chunk_lengths`` (batch,) int64: tokens in the chunk; the rest is right padding.
    """

    first_loop: NDArray[np.bool_]
    active: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    chunk_lengths: NDArray[np.int64]


class BackendState(Protocol):
    """The state buffers of a batch, allocated once, and the graphs bound to them.

    ``candidate_count``: how many top candidates ``candidates`` returns; 0: it returns None.
    """

    batch: int
    state_bytes: int
    candidate_count: int

    @property
    def computed_by(self) -> str:
        """The name of what computes the cache: the backend, and for TensorRT the engine."""

    def embed(self, token_ids: NDArray[np.int64]) -> None:
        """Embed token_ids (batch, chunk) into the hidden buffer."""

    def loop(self, control: LoopControl) -> NDArray[np.float32]:
        """Run one loop step and swap hidden and latent. Return the exit probability (batch, chunk), valid until the
        next call."""

    def run_chunk(
        self,
        token_ids: NDArray[np.int64],
        control: LoopControl,
        loops: int,
        head: bool,
        between: Callable[[], None] | None = None,
    ) -> None:
        """Run ``embed``, ``loops`` loop steps and ``commit`` without decisions in between. ``control`` is the first
        loop's.

        ``head``: a hint that logits are needed next, so that a whole token can be one launch. ``between``: called
        between loops that are launched one by one; an exception in it ends the chunk, whose positions then do not
        count.
        """

    def commit(self, control: LoopControl) -> None:
        """Write the chunk's positions into the caches after its last loop, unless the graph has done so."""

    def logits(self, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits of columns (batch, n) of the chunk as (batch, n, vocab), valid until the next call."""

    def candidates(self, columns: NDArray[np.int64]) -> list[Candidates] | None:
        """Return the top candidates after columns (batch, 1), one per sequence; None if the backend gives all logits
        only."""

    def part(self, first: int, count: int) -> BackendState | None:
        """Return sequences ``first`` to ``first + count - 1`` as a state over the same memory; only one may run at a
        time. None where the backend does not support it."""

    def exit_probability(self) -> NDArray[np.float32]:
        """Return a copy of the last loop step's exit probability (batch, chunk)."""

    def read(self, name: str, index: Any = ...) -> NDArray[Any]:
        """Return a copy of a state, by its name in the manifest; ``index`` selects a part of it."""

    def read_positions(self, slot: int, start: int, stop: int, loops: int | None = None) -> dict[str, NDArray[Any]]:
        """Return a copy of cache positions ``start`` to ``stop - 1`` of a sequence, by buffer (kv_heads, positions,
        head_dim)."""

    def write_positions(self, slot: int, start: int, positions: Mapping[str, NDArray[Any]]) -> None:
        """Write what ``read_positions`` returned into a sequence's caches from position ``start`` on."""


class Backend(Protocol):
    """A loaded package that opens states of up to ``max_batch`` sequences."""

    name: str

    @property
    def max_batch(self) -> int:
        """The most sequences in a batch."""

    def available_bytes(self) -> int | None:
        """Return the free memory where states are allocated, in bytes; None if unknown."""

    def open_state(self, batch: int) -> BackendState:
        """Allocate all state of a batch. Raises BackendError without memory for it."""
