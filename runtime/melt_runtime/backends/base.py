"""The protocol of a backend. It owns buffers and execution, and knows nothing of the model's logic."""

from __future__ import annotations

from typing import Protocol

from .buffers import BufferState


class Backend(Protocol):
    """A loaded package that opens states of up to ``max_batch`` sequences."""

    name: str

    @property
    def max_batch(self) -> int:
        """The most sequences in a batch."""

    def available_bytes(self) -> int | None:
        """Return the free memory where states are allocated, in bytes; None if unknown."""

    def open_state(self, batch: int) -> BufferState:
        """Allocate all state of a batch. Raises BackendError without memory for it."""
