"""Chunks: slices of every sequence's new tokens, whose loops run together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import PromptError, PromptTooLongError
from ..package.manifest import Manifest


class Chunk(NamedTuple):
    """A slice of every sequence's new tokens.

    ``ids`` (batch, width): right-padded token ids. ``counts`` (batch,): tokens per sequence. ``last`` (batch,): whether
    the chunk holds a sequence's last new token. ``present`` (batch, width): False for padding.
    """

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]
    last: NDArray[np.bool_]
    present: NDArray[np.bool_]


def cut(arrays: Sequence[NDArray[np.int64]], most: NDArray[np.int64]) -> list[Chunk]:
    """Cut every sequence's new tokens into chunks of at most ``most`` (batch,) tokens, from its first new token on."""
    counts = np.array([len(array) for array in arrays], np.int64)
    chunks, done = [], np.zeros(len(arrays), np.int64)
    while (done < counts).any():
        here = np.minimum(counts - done, most)
        ids = np.zeros((len(arrays), int(here.max())), np.int64)
        for slot, array in enumerate(arrays):
            ids[slot, : here[slot]] = array[done[slot] : done[slot] + here[slot]]
        done = done + here
        chunks.append(make_chunk(ids, here, (here > 0) & (done == counts)))
    return chunks


def checked_ids(ids: Sequence[int], room: int, manifest: Manifest) -> NDArray[np.int64]:
    """Return token ids as an array. Raises PromptError if one is out of range or there are more than ``room``."""
    try:
        array = np.asarray(ids).reshape(-1)
    except (TypeError, ValueError) as error:
        raise PromptError("token ids must be whole numbers inside the vocabulary") from error
    if len(array) > room:
        message = f"{len(array)} tokens do not fit: the cache has room for {room} of {manifest.max_seq_len}"
        raise PromptTooLongError(message)
    if len(array) and array.dtype.kind not in "iu":
        raise PromptError("token ids must be whole numbers inside the vocabulary")
    wrong = array[(array < 0) | (array >= manifest.vocab_size)]
    if len(wrong):
        raise PromptError(f"token id {wrong[0]} is outside the vocabulary of {manifest.vocab_size}")
    return array.astype(np.int64, copy=False)


def make_chunk(ids: NDArray[np.int64], counts: NDArray[np.int64], last: NDArray[np.bool_]) -> Chunk:
    """Make a chunk and mark its padding."""
    return Chunk(ids, counts, last, np.arange(ids.shape[1]) < counts[:, None])
