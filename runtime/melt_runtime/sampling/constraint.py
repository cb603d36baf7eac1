"""What restricts which tokens a sequence may continue with, such as a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError


class Constraint(Protocol):
    """What a sequence may say, such as a grammar. One object serves one sequence."""

    def mask(self, history: Sequence[int]) -> NDArray[np.bool_] | None:
        """Which tokens may come next (vocab,), after those that were drawn (the prompt is not among them); None: any.

        A finished grammar allows the stop ids alone.
        """

    def accept(self, token: int) -> None:
        """A token was drawn."""


def masked(row: NDArray[np.float32], allowed: NDArray[Any]) -> NDArray[np.float32]:
    """A row of logits (vocab,) in which what is not allowed is -inf. Raises ArgumentError for a mask of another shape
    or one that leaves nothing."""
    if np.shape(allowed) != row.shape:
        raise ArgumentError(f"the constraint's mask has the shape {np.shape(allowed)}; the logits have {row.shape}")
    if not np.any(allowed):
        raise ArgumentError("the constraint allows no token, not even a stop id")
    return np.where(allowed, row, np.float32(-np.inf)).astype(np.float32, copy=False)
