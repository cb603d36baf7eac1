"""Log probabilities of the sampled and the likeliest tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..results import Logprobs
from .sampler import largest


def logprobs_of(row: NDArray[np.float32], token: int, count: int) -> Logprobs:
    """Return the log probabilities of a token and of the ``count`` likeliest tokens, in float32.

    ``row``: all logits (vocab,). Equally likely tokens are ordered by id.
    """
    shifted = row.astype(np.float32) - np.float32(row.max())
    values = shifted - np.log(np.exp(shifted).sum(dtype=np.float32))
    count = min(count, len(values))
    top = largest(values, count, np.partition(values, -count)[-count]) if count else np.zeros(0, np.intp)
    ranked = top[np.argsort(-values[top], kind="stable")]
    return Logprobs(float(values[token]), tuple((int(i), float(values[i])) for i in ranked))
