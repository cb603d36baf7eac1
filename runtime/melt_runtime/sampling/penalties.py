"""What changes logits before a token is chosen: biases by token, and penalties for tokens seen before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from ..untrusted import shown

_DIGITS = 10  # the most that a token id has


class Biases:
    """Numbers to add to the logits of tokens. ``pairs``: (id, number), by id."""

    def __init__(self, pairs: tuple[tuple[int, float], ...] = ()):
        self.pairs = pairs

    @classmethod
    def of(cls, given: Mapping[Any, Any] | None) -> Biases:
        """Read biases by token id, which may be decimal text, as JSON has it. Raises ArgumentError."""
        if given is None:
            return _NONE
        if not isinstance(given, Mapping):
            raise ArgumentError(f"logit_bias must be a mapping from token ids to numbers, not {shown(given)}.")
        found = {}
        for key, value in given.items():
            if isinstance(key, bool) or not (isinstance(key, Integral) or _is_decimal(key)) or int(key) < 0:
                raise ArgumentError(f"logit_bias must be by token id, a whole number from 0, not by {shown(key)}.")
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ArgumentError(f"logit_bias of token {int(key)} must be a finite number, not {shown(value)}.")
            found[int(key)] = float(value)
        return cls(tuple(sorted(item for item in found.items() if item[1])))

    @cached_property
    def ids(self) -> npt.NDArray[np.int64]:
        """The token ids, ascending."""
        return np.array([one for one, _ in self.pairs], np.int64)

    @cached_property
    def values(self) -> npt.NDArray[np.float64]:
        """What to add to their logits."""
        return np.array([value for _, value in self.pairs], np.float64)

    def check(self, vocab: int) -> None:
        """Raise ArgumentError for a token outside the vocabulary."""
        if self.pairs and self.pairs[-1][0] >= vocab:
            raise ArgumentError(f"logit_bias names token {self.pairs[-1][0]}; the last is {vocab - 1}.")

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Biases) and self.pairs == other.pairs

    def __hash__(self) -> int:
        return hash(self.pairs)

    def __repr__(self) -> str:
        return f"Biases({shown(dict(self.pairs))})"


_NONE = Biases()


def _is_decimal(key: object) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= _DIGITS


def biased(scores: npt.NDArray[Any], biases: Biases) -> npt.NDArray[np.float64]:
    """Return a copy of the scores (vocab,) with the biases added. Raises ArgumentError for ids outside the
    vocabulary."""
    made = scores.astype(np.float64)
    if biases:
        biases.check(scores.size)
        made[biases.ids] += biases.values
    return made


def by_count(
    scores: npt.NDArray[np.float64], generated: Sequence[int] | npt.NDArray[Any], frequency: float, presence: float
) -> npt.NDArray[np.float64]:
    """Subtract ``frequency`` times its number and once ``presence`` from each generated token's score; changes
    ``scores`` (vocab,). Raises ArgumentError."""
    ids, counts = _counted(generated, scores.size)
    scores[ids] -= frequency * counts + presence
    return scores


def penalise(
    scores: npt.NDArray[Any],
    history: Sequence[int] | npt.NDArray[Any],
    penalty: float,
    ids: npt.NDArray[Any] | None = None,
    vocab: int | None = None,
) -> npt.NDArray[np.float64]:
    """Return a copy of the scores with the repetition penalty applied once per token of the history. Raises
    ArgumentError.

    ``scores``: of the whole vocabulary, or of ``ids`` (ascending) out of ``vocab``.
    """
    penalised = scores.astype(np.float64)
    seen_ids, _ = _counted(history, scores.size if vocab is None else vocab)
    if seen_ids.size == 0:
        return penalised
    at = seen_ids if ids is None else np.flatnonzero(np.isin(ids, seen_ids))
    seen = penalised[at]
    penalised[at] = np.where(seen > 0, seen / penalty, seen * penalty)
    return penalised


def _counted(
    history: Sequence[int] | npt.NDArray[Any], vocab: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the different ids of a history, ascending, and how often each occurs. Raises ArgumentError."""
    ids, counts = np.unique(np.asarray(history), return_counts=True)
    if ids.size == 0:
        return np.zeros(0, np.int64), counts
    if not np.issubdtype(ids.dtype, np.integer):
        raise ArgumentError(f"The history must be token ids, not values of type {ids.dtype}.")
    if ids[0] < 0 or ids[-1] >= vocab:
        raise ArgumentError(f"The history must be token ids from 0 to {vocab - 1}, but spans {ids[0]} to {ids[-1]}.")
    return ids, counts
