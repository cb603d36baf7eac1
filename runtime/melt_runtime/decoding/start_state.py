"""Seeded noise that a looped model's hidden state starts from, equal to the last bit on every machine.

It needs numpy alone: whoever runs a model without PyTorch computes the same values from this definition.

1. A block of four elements j = 4 b .. 4 b + 3 of a token's state takes the four 32-bit words of Philox4x32-10
   (Salmon, Moraes, Dror and Shaw, SC 2011), with the counter (b, position, 0, 0) and the key (seed mod 2^32,
   seed / 2^32). ``position`` is the token's place in its sequence, from 0; ``seed`` has 64 bits.
2. A word k becomes q = ((k + 0.5) / 2^32 - 0.5) * WIDTH, evenly spread within the middle WIDTH of probability, which is
   that of a normal variable within three standard deviations.
3. z = q * P(q^2) / Q(q^2), both by Horner's rule from the highest power, then cut to [-3, 3]: the normal quantile of
   0.5 + q within 1e-5.
4. The element is z * std, rounded to float32.

Steps 2 to 4 are in float64 and use additions, multiplications and one division only, which IEEE 754 rounds alike
everywhere. Values depend on seed, position and element alone, so a prompt may be run in pieces of any size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

WIDTH = 0.9973002039367398
# Fitted to q -> z(q) / q over q^2 from 0 to (WIDTH / 2)^2, in powers of q^2 / (WIDTH / 2)^2 from the lowest.
P = (2.506633806005, -9.146115766465, 12.696234044769, -8.167375710465, 2.300032887055, -0.189394233273)
Q = (1.0, -3.909063485347, 5.939683432617, -4.341164277417, 1.500024805536, -0.189477977561)
MOST = 3.0


def philox(counters: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Return Philox4x32-10 of counters (..., 4), each element one 32-bit word, in the same shape."""
    x0, x1, x2, x3 = (counters[..., word] for word in range(4))
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(_ROUNDS):
        first, second = x0 * np.uint64(_MULTIPLIERS[0]), x2 * np.uint64(_MULTIPLIERS[1])
        x0, x2 = (second >> np.uint64(32)) ^ x1 ^ np.uint64(key[0]), (first >> np.uint64(32)) ^ x3 ^ np.uint64(key[1])
        x1, x3 = second & np.uint64(_WORD), first & np.uint64(_WORD)
        key = [(part + step) & _WORD for part, step in zip(key, _KEY_STEPS, strict=True)]
    return np.stack((x0, x1, x2, x3), axis=-1)


def start_noise(seed: int, positions: NDArray[np.int64], size: int, std: float) -> NDArray[np.float32]:
    """Return the start state of the tokens of one sequence, (tokens, size).

    positions: (tokens,), each below 2^32. ``seed``: a whole number from 0 to 2^64 - 1. Raises ValueError.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be a whole number from 0 to 2^64 - 1")
    blocks = -(-size // 4)
    counters = np.zeros((len(positions), blocks, 4), dtype=np.uint64)
    counters[..., 0] = np.arange(blocks, dtype=np.uint64)
    counters[..., 1] = np.asarray(positions).astype(np.uint64)[:, None]
    words = philox(counters, seed).reshape(len(positions), -1)[:, :size]
    q = ((words.astype(np.float64) + 0.5) / 2.0**32 - 0.5) * WIDTH
    x = q * q / (WIDTH / 2) ** 2
    z = np.clip(q * _horner(P, x) / _horner(Q, x), -MOST, MOST)
    return (z * std).astype(np.float32)


def _horner(powers: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    result = np.full_like(x, powers[-1])
    for power in reversed(powers[:-1]):
        result = result * x + power
    return result
