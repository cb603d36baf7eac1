"""The logits after a step, brought to the host only as far as someone asks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..backends.base import BackendState
from ..sampling.sampler import Sampler
from ..sampling.top_candidates import Candidates, sample_candidates


class NextLogits:
    """The logits after each sequence's last new token. Valid until the session moves on."""

    def __init__(self, state: BackendState, vocab: int):
        self._state, self._vocab = state, vocab
        self._rows: dict[int, NDArray[np.float32]] = {}  # of sequences that ended in an earlier chunk
        self._columns: NDArray[np.int64]  # of the chunk that ran last
        self._last: NDArray[np.bool_] | None = None  # the sequences that ended in it
        self._likeliest: dict[int, Candidates] | None = None
        self._whole: NDArray[np.float32] | None = None  # (batch, 1, vocab)

    def follow(self, columns: NDArray[np.int64], last: NDArray[np.bool_]) -> None:
        """A chunk ran: its columns (batch, 1) hold the logits of the sequences that ended in it."""
        self._columns, self._last = columns, last

    def keep(self) -> None:
        """Copies what there is, for the next chunk takes its place."""
        for slot in self._ended():
            self._rows[slot] = self.row(slot).copy()
        self._last = self._likeliest = self._whole = None

    def sample(self, slot: int, sampler: Sampler, history: Sequence[int]) -> int:
        """The sampler's next token: from the likeliest few where they settle it, else from the whole row."""
        candidates = self.candidates(slot) if self._state.likeliest else None
        token = None if candidates is None else sample_candidates(sampler, candidates, history)
        return sampler.sample(self.row(slot), history) if token is None else token

    def candidates(self, slot: int) -> Candidates | None:
        """The likeliest tokens of a sequence, where the backend picks them out; else None."""
        if slot in self._rows or self._whole is not None:
            return None
        if self._likeliest is None:
            found = self._state.candidates(self._columns)
            self._likeliest = {} if found is None else dict(enumerate(found))
        return self._likeliest.get(slot)

    def row(self, slot: int) -> NDArray[np.float32]:
        """All logits of a sequence (vocab,)."""
        if slot in self._rows:
            return self._rows[slot]
        if self._whole is None:
            self._whole = self._state.logits(self._columns)
        return self._whole[slot, 0]

    def full(self) -> NDArray[np.float32]:
        """A copy of all logits (batch, vocab); zero for a sequence without new tokens."""
        logits = np.zeros((self._state.batch, self._vocab), np.float32)
        for slot in {*self._rows, *self._ended()}:
            logits[slot] = self.row(slot)
        return logits

    def _ended(self) -> list[int]:
        """The sequences whose logits the backend has."""
        return [] if self._last is None else np.flatnonzero(self._last).tolist()
