"""What is known of the tokens in a cache: how many each sequence has, and the loops that each of them ran.

A sequence's length is the one number that says which tokens count. It is written last, after everything that belongs to
the new tokens, so that an exception between any two instructions (Ctrl-C, no memory) leaves the sequence as it was
before or as it is afterwards. That a sequence changes is noted first, before its caches are written.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class CachedTokens:
    """The tokens in the caches of a batch.

    ``whole``: that of which this one is a part, beginning at sequence ``first``. ``lengths`` (batch,): tokens per
    sequence. ``versions`` (batch,): how often each sequence has changed, by this object, its whole or its parts.
    ``loops`` (batch, capacity): loops run per token; behind a sequence's length it may hold anything.
    """

    def __init__(self, batch: int, capacity: int, whole: CachedTokens | None = None, first: int = 0):
        own = slice(first, first + batch)
        self.lengths: NDArray[np.int64] = np.zeros(batch, np.int64) if whole is None else whole.lengths[own]
        self.versions: NDArray[np.int64] = np.zeros(batch, np.int64) if whole is None else whole.versions[own]
        self.loops: NDArray[np.int32] = np.zeros((batch, capacity), np.int32) if whole is None else whole.loops[own]

    def depth(self, slot: int) -> list[int]:
        """Return the loops run for each token of a sequence."""
        return self.loops[slot, : int(self.lengths[slot])].tolist()  # type: ignore[no-any-return]

    def change(self, slot: int) -> None:
        """Note that the caches of a sequence are about to change."""
        self.versions[slot] += 1

    def keep(self, slot: int, length: int) -> None:
        """Keep the first ``length`` tokens of a sequence."""
        self.versions[slot] += 1
        self.lengths[slot] = length

    def add(self, slot: int, loops: Sequence[int]) -> None:
        """Append tokens that are in the caches, with the loops that each ran."""
        start = int(self.lengths[slot])
        end = start + len(loops)
        self.versions[slot] += 1
        self.loops[slot, start:end] = loops
        self.lengths[slot] = end

    def move(self, slot: int, to: int) -> None:
        """Put a sequence into another's place, whose tokens are dropped."""
        loops = self.depth(slot)
        self.keep(to, 0)
        self.add(to, loops)
        self.keep(slot, 0)
