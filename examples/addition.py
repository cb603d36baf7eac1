"""The demo task: adding two numbers written out as text, most significant digit first. No torch is needed here.

A problem is the prompt ``4829173+3917458=``; its answer is ``8746631`` and then the end token. Every number is written
with DIGITS digits (``0000042``) and no sum has more, so a column always stands at the same place. Whether a problem is
held out is a property of its numbers (a stable hash), so training and testing cannot overlap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

PAD, END = "<|pad|>", "<|endoftext|>"
VOCABULARY = (PAD, END, *"0123456789+=")
DIGITS = 7
LARGEST = 10**DIGITS - 1
PROMPT_TOKENS, ANSWER_TOKENS = 2 * DIGITS + 2, DIGITS + 1  # the answer's last token is END
HELD_OUT_PERCENT = 10
NINES = 1 / 3  # of the columns, in the test set with long carries


@dataclass(frozen=True)
class Problem:
    """One addition: ``prompt`` is what the model reads, ``answer`` what it should write before the end token."""

    a: int
    b: int

    def __post_init__(self) -> None:
        if min(self.a, self.b) < 0 or self.a + self.b > LARGEST:
            raise ValueError(f"{self.a}+{self.b}: both numbers must be 0 or more and their sum at most {LARGEST}")

    @property
    def prompt(self) -> str:
        return f"{self.a:0{DIGITS}d}+{self.b:0{DIGITS}d}="

    @property
    def answer(self) -> str:
        return f"{self.a + self.b:0{DIGITS}d}"

    @property
    def carries(self) -> int:
        """In how many columns the digits add up to 10 or more, a carry from the right included."""
        return sum(self.a % 10**n + self.b % 10**n >= 10**n for n in range(1, DIGITS + 1))

    @property
    def held_out(self) -> bool:
        """Whether this is a test problem: the first 8 bytes of SHA-256 of "a+b", modulo 100, are below 10."""
        digest = hashlib.sha256(f"{self.a}+{self.b}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def sample(
    rng: np.random.Generator, count: int, held_out: bool, carry_free: float = 0.0, nines: float = 0.0
) -> list[Problem]:
    """``count`` problems, all of them held out or none of them.

    They are drawn evenly among those whose sum fits, except that a share ``carry_free`` of the columns is made free
    of carries (digits that add up to more than 9 are replaced by 9 minus the digit), which is easier, and a share
    ``nines`` is made to add up to 9, so that a carry from the right goes on to the left, which is harder.
    """
    problems: list[Problem] = []
    while len(problems) < count:
        digits = rng.integers(0, 10, (2, 2 * count, DIGITS))
        easy = rng.random((2 * count, DIGITS)) < carry_free
        digits = np.where(easy & (digits.sum(0) > 9), 9 - digits, digits)
        digits[1] = np.where(rng.random((2 * count, DIGITS)) < nines, 9 - digits[0], digits[1])
        a, b = (digits @ 10 ** np.arange(DIGITS - 1, -1, -1)).tolist()
        drawn = (Problem(x, y) for x, y in zip(a, b, strict=True) if x + y <= LARGEST)
        problems += [problem for problem in drawn if problem.held_out == held_out]
    return problems[:count]


def held_out_problems(count: int, seed: int = 0, long_carries: bool = False) -> list[Problem]:
    """``count`` different test problems, the same ones for the same seed; with long carries or drawn evenly."""
    rng = np.random.default_rng(seed)
    problems: dict[Problem, None] = {}
    while len(problems) < count:
        problems.update(dict.fromkeys(sample(rng, count, held_out=True, nines=NINES if long_carries else 0.0)))
    return list(problems)[:count]


def is_correct(problem: Problem, completion: str) -> bool:
    """Whether a completion is exactly the answer; the end token and what follows it are not part of it."""
    return completion.split(END)[0] == problem.answer


def accuracy(problems: Iterable[Problem], completions: Iterable[str]) -> float:
    """The share of completions that are exactly right, 0 to 1."""
    results = [is_correct(problem, text) for problem, text in zip(problems, completions, strict=True)]
    return sum(results) / max(len(results), 1)
