"""Held-out text as sequences of token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def held_out_sequences(files: Sequence[str], length: int, most: int) -> list[Tensor]:
    """Return up to ``most`` sequences per file of uint16 ids, spread evenly over it: each (n, length + 1) int64."""
    found = []
    for file in files:
        tokens = np.fromfile(file, dtype=np.uint16).astype(np.int64)
        count = min(most, (len(tokens) - 1) // length)
        if count > 0:
            starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
            found.append(torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts])))
    return found
