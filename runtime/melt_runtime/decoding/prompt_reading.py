"""What is read of a prompt while it runs: the log probabilities of its tokens, or the mean of its hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..results import Logprobs
from ..sampling.logprobs import logprobs_of
from .next_logits import NextLogits

_VALUES = 1 << 22  # logits that are read at once, 16 MiB


class PromptReading(Protocol):
    """The protocol of an object that reads a prompt as its chunks run. One object serves one request, whose prompt then
    runs in full, even if a prefix cache holds its beginning."""

    def read(self, logits: NextLogits, slot: int, start: int, tokens: Sequence[int]) -> None:
        """Read a chunk that has run: the sequence's ``tokens``, of which the first is the prompt's token ``start``."""


class PromptLogprobs:
    """The log probability of each token of a prompt after those before it, and the likeliest tokens in its place.

    ``prompt``: the token ids. ``count``: how many of the likeliest. Iterate it for one Logprobs per token once the
    request has sent its first delta or ended; the first token, which follows nothing, has None. Takes 8 bytes per token
    and likeliest token.
    """

    def __init__(self, prompt: Sequence[int], count: int = 0):
        self._prompt, self._read = prompt, 1
        self._values = np.zeros(len(prompt), np.float32)
        self._top_ids: NDArray[np.int32] = np.zeros((len(prompt), count), np.int32)
        self._top_values: NDArray[np.float32] = np.zeros((len(prompt), count), np.float32)

    def read(self, logits: NextLogits, slot: int, start: int, tokens: Sequence[int]) -> None:
        """Read a chunk. Raises ArgumentError if the model returns NaN."""
        ends = min(len(tokens), len(self._prompt) - start - 1)  # the last token's logits are the answer's
        at = 0
        while at < ends:
            rows = logits.of_chunk(slot, slice(at, min(at + self._step(logits), ends)))
            for row in rows:
                at += 1
                self._take(start + at, row)

    def _step(self, logits: NextLogits) -> int:
        return max(_VALUES // logits.size, 1)

    def _take(self, at: int, row: NDArray[np.float32]) -> None:
        count = min(self._top_ids.shape[1], len(row))
        if count < self._top_ids.shape[1]:  # a vocabulary with fewer tokens than were asked for
            self._top_ids, self._top_values = self._top_ids[:, :count], self._top_values[:, :count]
        found = logprobs_of(row, self._prompt[at], count)
        if np.isnan(found.token):
            raise ArgumentError("The model returned NaN logits; check its weights and the precision it runs in.")
        self._values[at] = found.token
        for rank, (token, value) in enumerate(found.top):
            self._top_ids[at, rank], self._top_values[at, rank] = token, value
        self._read = at + 1

    def __len__(self) -> int:
        return self._read

    def __iter__(self) -> Iterator[Logprobs | None]:
        yield None
        for at in range(1, self._read):
            top = zip(self._top_ids[at].tolist(), self._top_values[at].tolist(), strict=True)
            yield Logprobs(float(self._values[at]), tuple(top))


class MeanHidden:
    """The mean of a prompt's hidden states after the last loop of each token, as an embedding of the text."""

    def __init__(self) -> None:
        self._sum: NDArray[np.float64] | None = None
        self._count = 0

    def read(self, logits: NextLogits, slot: int, start: int, tokens: Sequence[int]) -> None:
        """Read a chunk."""
        total = logits.hidden(slot, len(tokens)).sum(axis=0, dtype=np.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(tokens)

    def mean(self) -> NDArray[np.float32]:
        """Return the mean over the tokens read so far (d,). Raises ArgumentError if it is not finite, or if there is
        none."""
        if self._sum is None:
            raise ArgumentError("no token has run")
        found = (self._sum / self._count).astype(np.float32)
        if not np.isfinite(found).all():
            raise ArgumentError("The model returned NaN or infinite hidden states; check its weights and precision.")
        return found
