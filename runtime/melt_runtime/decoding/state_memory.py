"""The memory that a session would need."""

from __future__ import annotations

from dataclasses import dataclass

from ..backends.base import Backend
from ..backends.bindings import scratch_buffers
from ..package.manifest import Manifest
from ..untrusted import whole_number


@dataclass(frozen=True)
class Memory:
    """Memory in bytes.

    ``state_bytes`` and ``scratch_bytes`` (graph inputs and outputs, without an engine's own) are allocated per session,
    ``weights_bytes``, as stored, once. ``available_bytes``: free now where the session would be allocated, with the
    weights loaded; None if unknown.
    """

    state_bytes: int
    scratch_bytes: int
    weights_bytes: int
    available_bytes: int | None

    @property
    def session_bytes(self) -> int:
        """The bytes that one session allocates."""
        return self.state_bytes + self.scratch_bytes

    @property
    def fits(self) -> bool:
        """Whether a session fits, as far as is known."""
        return self.available_bytes is None or self.session_bytes <= self.available_bytes


def memory(manifest: Manifest, backend: Backend, max_seq_len: int | None, batch: int) -> Memory:
    """Return the memory of a session, as ``Runtime.memory``."""
    whole_number("batch", batch)
    if max_seq_len is not None:
        whole_number("max_seq_len", max_seq_len)
        manifest = manifest.resized(max_seq_len)
    scratch = sum(scratch_buffers(manifest, batch).values())
    return Memory(manifest.state_bytes(batch), scratch, manifest.weights_bytes, backend.available_bytes())
