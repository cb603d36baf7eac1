"""The logits after each sequence's last token, read when they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..backends.buffers import BufferState
from ..sampling.sampler import Sampler
from ..sampling.top_candidates import Candidates, sample_candidates


class NextLogits:
    """The logits after each sequence's last new token. Valid until the driver runs again."""

    def __init__(self, state: BufferState, vocab: int):
        self._state, self._vocab = state, vocab
        self._rows: dict[int, NDArray[np.float32]] = {}  # of sequences whose last token was in an earlier chunk
        self._columns: NDArray[np.int64]  # of the last chunk
        self._last: NDArray[np.bool_] | None = None  # sequences whose last token was in that chunk
        self._candidates: dict[int, Candidates] | None = None
        self._whole: NDArray[np.float32] | None = None  # (batch, 1, vocab)

    def follow(self, columns: NDArray[np.int64], last: NDArray[np.bool_]) -> None:
        """Take the logits of a chunk that ran: its ``columns`` (batch, 1), of the sequences in ``last``."""
        self._columns, self._last = columns, last

    def hold(self, slot: int, row: NDArray[np.float32]) -> None:
        """Take a sequence's logits (vocab,) from elsewhere."""
        self._rows[slot] = row

    def keep(self) -> None:
        """Copy the logits that the next chunk will overwrite."""
        for slot in self._ended():
            self._rows[slot] = self.row(slot).copy()
        self._last = self._candidates = self._whole = None

    def sample(self, slot: int, sampler: Sampler, history: Sequence[int]) -> int:
        """Sample the next token: from the top candidates if they are enough, else from all logits."""
        candidates = self.candidates(slot) if self._state.candidate_count else None
        token = None if candidates is None else sample_candidates(sampler, candidates, history)
        return sampler.sample(self.row(slot), history) if token is None else token

    def candidates(self, slot: int) -> Candidates | None:
        """Return a sequence's top candidates; None where the backend does not select them."""
        if slot in self._rows or self._whole is not None:
            return None
        if self._candidates is None:
            found = self._state.candidates(self._columns)
            self._candidates = {} if found is None else dict(enumerate(found))
        return self._candidates.get(slot)

    def row(self, slot: int) -> NDArray[np.float32]:
        """Return all logits of a sequence (vocab,)."""
        if slot in self._rows:
            return self._rows[slot]
        if self._whole is None:
            self._whole = self._state.logits(self._columns)
        return self._whole[slot, 0]

    @property
    def size(self) -> int:
        """The logits after one column of the batch."""
        return self._state.batch * self._vocab

    def of_chunk(self, slot: int, columns: slice) -> NDArray[np.float32]:
        """Return the logits after each of several tokens of a sequence in the last chunk: (columns, vocab)."""
        which = np.tile(np.arange(columns.start, columns.stop), (self._state.batch, 1))
        return self._state.logits(which)[slot]

    def hidden(self, slot: int, count: int) -> NDArray[np.float32]:
        """Return a sequence's hidden states after the last loop of each of its ``count`` tokens in the last chunk:
        (count, d)."""
        return self._state.read("hidden", (slot, slice(count))).astype(np.float32)

    def full(self) -> NDArray[np.float32]:
        """Return a copy of all logits (batch, vocab); zeros for a sequence without new tokens."""
        logits = np.zeros((self._state.batch, self._vocab), np.float32)
        for slot in {*self._rows, *self._ended()}:
            logits[slot] = self.row(slot)
        return logits

    def _ended(self) -> list[int]:
        """Return the sequences whose logits are in the backend's buffer."""
        return [] if self._last is None else np.flatnonzero(self._last).tolist()
