"""The protocol of a backend: it owns buffers and execution, and nothing of the model's logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..sampling.top_candidates import Candidates


@dataclass(frozen=True)
class LoopControl:
    """What steers one loop step over a chunk.

    first_loop (batch,) bool; active (batch, chunk) bool; lengths (batch,) int64, tokens in the cache before this
    chunk; chunk_lengths (batch,) int64, how many of the chunk's columns are tokens (the rest is right padding).
    """

    first_loop: NDArray[np.bool_]
    active: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    chunk_lengths: NDArray[np.int64]


class BackendState(Protocol):
    """All state buffers of a batch, allocated once, and the graphs bound to them.

    ``likeliest``: how many of the likeliest tokens ``candidates`` picks out; 0: it gives None.
    """

    batch: int
    state_bytes: int
    likeliest: int

    @property
    def computed_by(self) -> str:
        """What computes the rows, by a name of its own: the backend, and of TensorRT the engine."""

    def embed(self, token_ids: NDArray[np.int64]) -> None:
        """token_ids (batch, chunk) -> the hidden buffer."""

    def loop(self, control: LoopControl) -> NDArray[np.float32]:
        """One loop step; swaps hidden and latent. Returns the exit probability (batch, chunk), valid until the next."""

    def run_chunk(
        self,
        token_ids: NDArray[np.int64],
        control: LoopControl,
        loops: int,
        head: bool,
        between: Callable[[], None] | None = None,
    ) -> None:
        """``embed``, ``loops`` loop steps and ``commit``, nothing decided between; ``control`` is the first one's.

        ``head``: whether logits are wanted next, so that the whole token may be one launch; only a hint. ``between``:
        called between two loops that are launched one by one; what it raises ends the chunk, of which no row counts.
        """

    def commit(self, control: LoopControl) -> None:
        """After a chunk's last loop: writes its rows, where the graph did not do that itself."""

    def logits(self, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of columns (batch, n) of the chunk -> (batch, n, vocab), valid until the next call."""

    def candidates(self, columns: NDArray[np.int64]) -> list[Candidates] | None:
        """The likeliest tokens after columns (batch, 1), a sequence each; None where only whole rows are to be had."""

    def part(self, first: int, count: int) -> BackendState | None:
        """Sequences ``first`` to ``first + count - 1`` as a state over the same memory, in turns with the whole; None
        where the backend cannot."""

    def exit_probability(self) -> NDArray[np.float32]:
        """A copy of what the last loop step returned, (batch, chunk)."""

    def read(self, name: str, index: Any = ...) -> NDArray[Any]:
        """A copy of a state as it stands, by its name in the manifest; ``index`` picks a part of it."""

    def read_positions(self, slot: int, start: int, stop: int, loops: int | None = None) -> dict[str, NDArray[Any]]:
        """A copy of the cache rows ``start`` to ``stop - 1`` of a sequence, by buffer (kv_heads, rows, head_dim)."""

    def write_positions(self, slot: int, start: int, positions: Mapping[str, NDArray[Any]]) -> None:
        """Writes what ``rows`` gave into the cache rows of a sequence from ``start`` on."""


class Backend(Protocol):
    """A loaded package, ready to open states of up to ``max_batch`` sequences."""

    name: str

    @property
    def max_batch(self) -> int:
        """The most sequences of a batch."""

    def available_bytes(self) -> int | None:
        """Memory that a state may take where it lies; None where nobody tells."""

    def open_state(self, batch: int) -> BackendState:
        """Allocates all state of a batch. Raises BackendError when there is no memory for it."""
