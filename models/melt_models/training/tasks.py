"""Synthetic tasks with exact answers that need depth: addition, chained modular arithmetic, p-hop induction.

Every task has one token per character; all its prompts have one length, and so have its answers. A stable hash of the
prompt decides whether an example is held out, so training and testing cannot overlap.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np

PAD, END = "<|pad|>", "<|endoftext|>"
HELD_OUT_PERCENT = 10
CURRICULUM = 0.4  # share of the run, at its start, in which a falling share of the examples is easier
TRAINING_NINES = 0.15  # addition: share of the columns that pass a carry on, after the curriculum
HARD_NINES = 1 / 3  # the same in the hard test set
OPERATORS = "+-*"
FRUITLESS_DRAWS = 200  # in a row, after which a task has no further examples


@dataclass(frozen=True)
class Example:
    """``prompt`` is read by the model; ``answer`` must be written before END."""

    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether this is a test example: the first 8 bytes of the prompt's SHA-256, modulo 100, are below 10."""
        return int.from_bytes(hashlib.sha256(self.prompt.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


class Task(Protocol):
    """A synthetic task. ``vocabulary`` is PAD, END, then the characters; ``answer_tokens`` counts END."""

    name: ClassVar[str]

    @property
    def vocabulary(self) -> tuple[str, ...]: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def answer_tokens(self) -> int: ...

    def sample(self, rng: np.random.Generator, count: int, held_out: bool, progress: float = 1.0) -> list[Example]:
        """Draw ``count`` examples, all held out or none, as in training at ``progress`` (0 to 1)."""
        ...

    def test_set(self, count: int, seed: int = 0, hard: bool = False) -> list[Example]:
        """Return ``count`` distinct held-out examples, the same for the same seed. Raises ValueError if there are too
        few."""
        ...


class _Drawn(ABC):
    """Base of tasks that draw examples in bulk: sample() and test_set(). Tasks are equal if their options are."""

    name: ClassVar[str]

    @abstractmethod
    def _training(self, rng: np.random.Generator, count: int, progress: float) -> list[Example]:
        """Draw about ``count`` training examples, held out or not."""

    @abstractmethod
    def _testing(self, rng: np.random.Generator, count: int, hard: bool) -> list[Example]:
        """Draw about ``count`` test examples, held out or not."""

    def sample(self, rng: np.random.Generator, count: int, held_out: bool, progress: float = 1.0) -> list[Example]:
        found: list[Example] = []
        fruitless = 0
        while len(found) < count:
            drawn = [x for x in self._training(rng, 2 * count, progress) if x.held_out == held_out]
            found += drawn
            fruitless = 0 if drawn else fruitless + 1
            self._check(fruitless, len(found), count)
        return found[:count]

    def test_set(self, count: int, seed: int = 0, hard: bool = False) -> list[Example]:
        rng = np.random.default_rng(seed)
        found: dict[Example, None] = {}
        fruitless = 0
        while len(found) < count:
            before = len(found)
            found.update(dict.fromkeys(x for x in self._testing(rng, 2 * count, hard) if x.held_out))
            fruitless = 0 if len(found) > before else fruitless + 1
            self._check(fruitless, len(found), count)
        return list(found)[:count]

    def _check(self, fruitless: int, found: int, count: int) -> None:
        if fruitless == FRUITLESS_DRAWS:
            raise ValueError(f"{self} has {found} such examples and not {count}; ask for fewer or make the task larger")


def _check_range(name: str, option: str, value: Any, smallest: int, largest: int) -> None:
    if type(value) is not int or not smallest <= value <= largest:
        raise ValueError(f"task {name}: {option} is {value!r}; it must be a whole number from {smallest} to {largest}")


def _easy(progress: float) -> float:
    """Return the share of the curriculum that is left: 1 at the start, 0 from CURRICULUM of the progress on."""
    return max(0.0, 1.0 - progress / CURRICULUM)


@dataclass(frozen=True)
class Addition(_Drawn):
    """Addition of two numbers with a fixed number of digits, most significant digit first: ``4829173+3917458=``
    ``8746631``.

    Sums have no more digits than the numbers, so a column is always at the same place. A carry may run through all
    columns, and the first written digit depends on it. At the start of training a falling share of the columns has no
    carries. Later a share of the columns adds up to 9 and so passes a carry on; in the hard test set a third does.
    """

    name: ClassVar[str] = "addition"
    digits: int = 7

    def __post_init__(self) -> None:
        _check_range(self.name, "digits", self.digits, 1, 18)  # sums stay below 2^63

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return PAD, END, *"0123456789+="

    @property
    def prompt_tokens(self) -> int:
        return 2 * self.digits + 2

    @property
    def answer_tokens(self) -> int:
        return self.digits + 1

    def example(self, a: int, b: int) -> Example:
        """Return the example a + b. Raises ValueError if a number is negative or the sum has too many digits."""
        if min(a, b) < 0 or a + b >= 10**self.digits:
            raise ValueError(f"{a}+{b}: both numbers must be 0 or more and their sum below {10**self.digits}")
        return Example(f"{a:0{self.digits}d}+{b:0{self.digits}d}=", f"{a + b:0{self.digits}d}")

    def _training(self, rng: np.random.Generator, count: int, progress: float) -> list[Example]:
        easy = _easy(progress)
        return self._draw(rng, count, easy, TRAINING_NINES * (1 - easy))

    def _testing(self, rng: np.random.Generator, count: int, hard: bool) -> list[Example]:
        return self._draw(rng, count, 0.0, HARD_NINES if hard else 0.0)

    def _draw(self, rng: np.random.Generator, count: int, carry_free: float, nines: float) -> list[Example]:
        """Draw evenly among the sums that fit, except for the shares of columns without carries or adding up to 9."""
        digits = rng.integers(0, 10, (2, count, self.digits))
        easy = rng.random((count, self.digits)) < carry_free
        digits = np.where(easy & (digits.sum(0) > 9), 9 - digits, digits)
        digits[1] = np.where(rng.random((count, self.digits)) < nines, 9 - digits[0], digits[1])
        numbers = (digits @ 10 ** np.arange(self.digits - 1, -1, -1)).tolist()
        return [self.example(a, b) for a, b in zip(*numbers, strict=True) if a + b < 10**self.digits]


@dataclass(frozen=True)
class Modular(_Drawn):
    """A chain of operations, strictly from left to right, modulo a prime: ``3+5*2-4=`` ``5`` (modulus 7).

    Every operation is a permutation of the residues other than the identity (no ``+0``, ``*0`` or ``*1``), so none can
    be skipped; since ``*`` and ``+`` do not commute, they cannot be reordered. All answers are equally likely. At the
    start of training a falling share of the operations is the identity (``+0``, ``-0`` or ``*1``). In the hard test set
    ``*`` alternates with ``+`` or ``-``.
    """

    name: ClassVar[str] = "modular"
    modulus: int = 7
    operations: int = 8

    def __post_init__(self) -> None:
        if type(self.modulus) is not int or self.modulus not in (3, 5, 7):  # modulo 2 every factor is 0 or 1
            raise ValueError(f"task {self.name}: modulus is {self.modulus!r}; it must be 3, 5 or 7")
        _check_range(self.name, "operations", self.operations, 1, 512)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return PAD, END, *(str(residue) for residue in range(self.modulus)), *OPERATORS, "="

    @property
    def prompt_tokens(self) -> int:
        return 2 * self.operations + 2

    @property
    def answer_tokens(self) -> int:
        return 2

    def _training(self, rng: np.random.Generator, count: int, progress: float) -> list[Example]:
        return self._draw(rng, rng.integers(0, 3, (count, self.operations)), _easy(progress))

    def _testing(self, rng: np.random.Generator, count: int, hard: bool) -> list[Example]:
        operators = rng.integers(0, 3, (count, self.operations))
        if hard:
            times = (np.arange(self.operations) + rng.integers(0, 2, (count, 1))) % 2 == 0
            operators = np.where(times, 2, operators % 2)
        return self._draw(rng, operators, 0.0)

    def _draw(self, rng: np.random.Generator, operators: np.ndarray, identities: float) -> list[Example]:
        """Draw examples. operators: (count, operations), indices into OPERATORS."""
        count, times = len(operators), operators == 2
        numbers = np.where(
            times, rng.integers(2, self.modulus, operators.shape), rng.integers(1, self.modulus, operators.shape)
        )
        numbers = np.where(rng.random(operators.shape) < identities, times, numbers)
        first = rng.integers(0, self.modulus, count)
        value = first
        for operator, number in zip(operators.T, numbers.T, strict=True):
            value = np.choose(operator, (value + number, value - number, value * number)) % self.modulus
        chains = zip(first.tolist(), operators.tolist(), numbers.tolist(), value.tolist(), strict=True)
        return [
            Example(f"{start}" + "".join(OPERATORS[o] + str(n) for o, n in zip(row, by, strict=True)) + "=", str(end))
            for start, row, by, end in chains
        ]


@dataclass(frozen=True)
class PHop(_Drawn):
    """p-hop induction (Sanford, Hsu and Telgarsky 2024, arXiv 2402.09268; for looped models arXiv 2502.17416).

    For a sequence X_1 ... X_n, find(i) = max {j <= i : X_{j-1} = X_i}: the position after the most recent earlier
    occurrence of the symbol at i. The answer is X at find applied ``hops`` times to n. No symbol follows itself here,
    so every hop goes to the left; sequences in which a hop finds nothing are not drawn.

    The prompt is the sequence and the number of hops: ``bcadbacd...4``. At the start of training a falling share of the
    examples has a number of hops drawn evenly from 1 to ``hops``. In the hard test set the answer is neither the last
    symbol nor the symbol after half of the hops.
    """

    name: ClassVar[str] = "p-hop"
    hops: int = 4
    length: int = 32
    alphabet: int = 4

    def __post_init__(self) -> None:
        _check_range(self.name, "hops", self.hops, 1, 99)
        _check_range(self.name, "alphabet", self.alphabet, 3, 26)  # with 2 the sequence could only alternate
        _check_range(self.name, "length", self.length, 3, 4096)
        # A hop goes alphabet - 1 to the left on average; in a shorter sequence few have room for all hops.
        if self.hops * self.alphabet > self.length:
            raise ValueError(
                f"task {self.name}: {self.hops} hops over an alphabet of {self.alphabet} need a length of "
                f"{self.hops * self.alphabet} or more, not {self.length}"
            )

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return PAD, END, *self._symbols, *"0123456789"

    @property
    def prompt_tokens(self) -> int:
        return self.length + self._digits

    @property
    def answer_tokens(self) -> int:
        return 2

    @property
    def _symbols(self) -> str:
        return "abcdefghijklmnopqrstuvwxyz"[: self.alphabet]

    @property
    def _digits(self) -> int:
        return len(str(self.hops))

    def _training(self, rng: np.random.Generator, count: int, progress: float) -> list[Example]:
        fewer = rng.random(count) < _easy(progress)
        hops = np.where(fewer, rng.integers(1, self.hops + 1, count), self.hops)
        return list(self._draw(rng, hops, hard=False))

    def _testing(self, rng: np.random.Generator, count: int, hard: bool) -> list[Example]:
        return list(self._draw(rng, np.full(count, self.hops), hard))

    def _draw(self, rng: np.random.Generator, hops: np.ndarray, hard: bool) -> Iterator[Example]:
        """Draw examples. hops: (count,), one for each sequence."""
        count, rows = len(hops), np.arange(len(hops))
        steps = rng.integers(1, self.alphabet, (count, self.length))
        symbols = (steps.cumsum(1) + rng.integers(0, self.alphabet, (count, 1))) % self.alphabet
        find = np.full((count, self.length), -1)  # -1: no earlier occurrence
        after = np.full((count, self.alphabet), -1)  # position after each symbol's last occurrence so far
        for at in range(self.length):
            find[:, at] = after[rows, symbols[:, at]]
            after[rows, symbols[:, at]] = at + 1
        path = np.full((count, self.hops + 1), self.length - 1)
        for hop in range(self.hops):
            path[:, hop + 1] = np.where(path[:, hop] < 0, -1, find[rows, path[:, hop]])
        end = path[rows, hops]
        keep = end >= 0
        answer = symbols[rows, end]
        if hard:
            keep &= (answer != symbols[:, -1]) & (answer != symbols[rows, path[rows, hops // 2]])
        for row in np.flatnonzero(keep):
            text = "".join(self._symbols[symbol] for symbol in symbols[row])
            yield Example(f"{text}{hops[row]:0{self._digits}d}", self._symbols[answer[row]])


TASKS: dict[str, type[Addition] | type[Modular] | type[PHop]] = {task.name: task for task in (Addition, Modular, PHop)}


def make_task(task: str, **options: Any) -> Task:
    """Make a task by its name and options. Raises ValueError for an unknown name or option, or a value out of range."""
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    known = [field.name for field in fields(TASKS[task])]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"task {task} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return TASKS[task](**options)
