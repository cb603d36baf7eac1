"""The seeded noise that loops start from: one definition, to the last bit."""

from __future__ import annotations

import ast
import hashlib
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from melt_models import start_state
from melt_models.start_state import philox, start_noise


def words_of(counter: list[int], seed: int) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    low, high = seed % 2**32, seed // 2**32
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32) ^ counter[1] ^ low,
            second % 2**32,
            (first >> 32) ^ counter[3] ^ high,
            first % 2**32,
        ]
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return counter


def element(seed: int, position: int, index: int, std: float) -> float:
    """One element of the noise, by the definition, in Python's numbers."""
    word = words_of([index // 4, position, 0, 0], seed)[index % 4]
    width = 0.9973002039367398
    q = ((word + 0.5) / 2.0**32 - 0.5) * width
    x = q * q / (width / 2) ** 2
    top, bottom = 0.0, 0.0
    for power in reversed(start_state.P):
        top = top * x + power
    for power in reversed(start_state.Q):
        bottom = bottom * x + power
    z = min(max(q * top / bottom, -3.0), 3.0)
    return float(struct.unpack("f", struct.pack("f", z * std))[0])


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        # The known answers that the authors of Philox publish.
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_generator_gives_its_authors_known_answers(counter: list[int], seed: int, words: list[int]) -> None:
    assert philox(np.array(counter, dtype=np.uint64), seed).tolist() == words
    assert words_of(counter, seed) == words


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**64 - 1])
def test_each_element_follows_from_seed_position_and_index_alone(seed: int) -> None:
    positions, size = np.array([0, 1, 7, 65535, 2**32 - 1]), 11
    noise = start_noise(seed, positions, size, 0.6)
    expected = [[element(seed, int(position), index, 0.6) for index in range(size)] for position in positions]
    assert noise.dtype == np.float32
    assert noise.tolist() == expected, "to the last bit"
    assert np.array_equal(start_noise(seed, positions[3:], size, 0.6), noise[3:])
    assert np.array_equal(start_noise(seed, positions, size + 30, 0.6)[:, :size], noise)


def test_the_values_never_change() -> None:
    noise = start_noise(42, np.arange(64), 5280, 0.6324555)
    assert hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest()[:32] == "0408dcb444af0c8405fe53f59c402d1d"


def test_the_noise_is_normal_and_cut_at_three_deviations() -> None:
    noise = start_noise(3, np.arange(200), 5000, 1.0).astype(np.float64).ravel()
    assert np.abs(noise).max() <= 3
    inside = math.erf(3 / math.sqrt(2))
    deviation = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / inside)
    assert abs(noise.mean()) < 0.004
    assert noise.std() == pytest.approx(deviation, abs=0.003)
    for z in (-2.5, -1.0, 0.0, 0.5, 2.0):
        below = (0.5 * math.erfc(-z / math.sqrt(2)) - (1 - inside) / 2) / inside
        assert (noise < z).mean() == pytest.approx(below, abs=0.002)
    assert np.corrcoef(noise[:-1], noise[1:])[0, 1] == pytest.approx(0, abs=0.004)


def test_a_seed_out_of_range_is_refused() -> None:
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed is {seed}; it must be a whole number"):
            start_noise(seed, np.arange(2), 4, 1.0)


def test_the_definition_needs_numpy_alone() -> None:
    tree = ast.parse(Path(start_state.__file__).read_text(encoding="utf-8"))
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    named |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    roots = {str(name).split(".")[0] for name in named}
    assert roots - set(sys.stdlib_module_names) == {"numpy"}
