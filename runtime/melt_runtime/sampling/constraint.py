"""Constraints: the tokens that a sequence may continue with, for example by a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError


class Constraint(Protocol):
    """The protocol of a constraint, such as a grammar. One object serves one sequence. Masks are copied, so that it may
    return one array again and again.

    It may also have ``mask_ahead(ahead)``: the tokens (vocab,) that may come after those accepted and the tokens of
    ``ahead``, which are not accepted by it; None if ``ahead`` is not allowed. Without it pipelined decoding drafts one
    token at a time.
    """

    def mask(self, history: Sequence[int]) -> NDArray[np.bool_] | None:
        """Return the tokens that may come next (vocab,), or None for all.

        ``history``: the tokens sampled so far, without the prompt. A finished grammar allows only stop ids.
        """

    def accept(self, token: int) -> None:
        """Record a sampled token."""


def masked(row: NDArray[np.float32], allowed: NDArray[Any]) -> NDArray[np.float32]:
    """Set the logits (vocab,) of forbidden tokens to -inf. Raises ArgumentError for a mask of another shape or without
    tokens."""
    if np.shape(allowed) != row.shape:
        raise ArgumentError(f"the constraint's mask has the shape {np.shape(allowed)}; the logits have {row.shape}")
    if not np.any(allowed):
        raise ArgumentError("the constraint allows no token, not even a stop id")
    return np.where(allowed, row, np.float32(-np.inf)).astype(np.float32, copy=False)
