"""The hidden state that a chunk's loops start from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..package.manifest import Manifest
from .settings import LoopSettings
from .start_state import start_noise


def start_row(manifest: Manifest, settings: LoopSettings, position: int) -> NDArray[np.float32] | None:
    """Return the start state of one token (d,), by its place in the sequence; None where its loops start from what the
    embedding gives."""
    if not manifest.injects:
        return None
    hidden = start_hidden(manifest, [settings], np.array([position]), np.ones(1, np.int64))
    return None if hidden is None else hidden[0, 0]


def start_hidden(
    manifest: Manifest, settings: Sequence[LoopSettings], lengths: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.float32] | None:
    """Return the start state of a chunk, (batch, width, d); None where the loops start from what the embedding gives.

    ``lengths``, ``counts`` (batch,): tokens in the cache and in the chunk. Padding gets zeros.
    """
    own = manifest.start.get("state", "embedding")
    states = {own if one.start_state is None else one.start_state for one in settings}
    if states == {"embedding"}:
        return None
    size, std = int(manifest.states[0].shape[-1]), float(manifest.start.get("std", 0.0))
    hidden = np.zeros((len(settings), int(counts.max()), size), np.float32)
    for slot, (one, length, count) in enumerate(zip(settings, lengths.tolist(), counts.tolist(), strict=True)):
        if count and (one.start_state or own) == "noise":
            hidden[slot, :count] = start_noise(one.start_seed, np.arange(length, length + count), size, std)
    return hidden
