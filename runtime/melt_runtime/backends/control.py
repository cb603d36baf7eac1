"""The control inputs of a loop step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LoopControl:
    """The control inputs of one loop step over a chunk.

    ``first_loop`` (batch,) bool, or (batch, chunk) in a package that staggers tokens. ``active`` (batch, chunk) bool.
    ``lengths`` (batch,) int64: tokens in the cache before this chunk. ``chunk_lengths`` (batch,) int64: tokens in the
    chunk; the rest is right padding.
    """

    first_loop: NDArray[np.bool_]
    active: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    chunk_lengths: NDArray[np.int64]
