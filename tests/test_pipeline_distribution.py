"""Sampling with pipelined decoding has plain decoding's distribution: a fault of 1% in a token's probability shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import LoopSettings, Runtime
from melt_runtime.decoding.generator import TokenSequence
from melt_runtime.decoding.loop_driver import LoopDriver
from melt_runtime.decoding.next_logits import NextLogits
from melt_runtime.decoding.pipeline import Pipeline, Pipelining
from numpy.typing import NDArray

LOOPS, VOCABULARY = 3, 5
PROMPT = [1, 3, 0, 2]
TOKENS = 5  # of an answer; the first comes from the prompt, the others are pipelined
ANSWERS = 10_000
SETTINGS = LoopSettings(LOOPS)
Answer = tuple[int, ...]
Probabilities = dict[Answer, NDArray[np.float64]]  # of the token (vocab,) after an answer's beginning


class Drawn(NamedTuple):
    """A token that pipelined decoding sampled.

    ``before``: the answer's earlier tokens. ``early``: the logits (vocab,) from which the token was drafted first.
    """

    before: Answer
    token: int
    early: NDArray[np.float32] | None


@pytest.fixture(scope="module")
def runtime(make_package: MakePackage, make_looplm: MakeCheckpoint) -> Runtime:
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "total_ut_steps": LOOPS, "initializer_range": 0.2}
    return Runtime.load(make_package(make_looplm(**shape), max_seq_len=16, chunk=8), threads=1)


@pytest.fixture(scope="module")
def plain(runtime: Runtime) -> Probabilities:
    """The probabilities by plain decoding."""
    driver, found = runtime.driver(), Probabilities()

    def descend(answer: Answer, logits: NDArray[np.float32]) -> None:
        found[answer] = softmax(logits)
        for token in range(VOCABULARY if len(answer) + 1 < TOKENS else 0):
            driver.truncate(0, len(PROMPT) + len(answer))
            descend((*answer, token), driver.append([[token]], SETTINGS)[0])

    descend((), driver.append([PROMPT], SETTINGS)[0])
    return found


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def draw(runtime: Runtime, seed: int, answers: int) -> list[Drawn]:
    """Draw answers with pipelined decoding, each with random numbers of its own. Return the pipelined tokens."""
    driver, drawn = runtime.driver(), list[Drawn]()
    first = NextLogits(driver.state, VOCABULARY)
    first.hold(0, driver.append([PROMPT], SETTINGS)[0])
    options = runtime.options(max_tokens=TOKENS, temperature=1.0, seed=seed, ignore_eos=True, pipeline="on")
    for stream in range(answers):
        driver.truncate(0, len(PROMPT))
        drawn += _answer(driver, TokenSequence(0, PROMPT, options, None, stream=stream), first)
    return drawn


def _answer(driver: LoopDriver, sequence: TokenSequence, logits: NextLogits) -> Iterator[Drawn]:
    early: dict[Answer, NDArray[np.float32]] = {}

    def draft(found: NDArray[np.float32], ahead: Sequence[int]) -> int | None:
        early.setdefault((*sequence.history, *ahead)[len(PROMPT) :], found.copy())
        return sequence.draft(found, ahead)

    token = sequence.sample(logits, 9, LOOPS).token_id
    for _ in range(TOKENS - 1):
        logits = driver.advance([[token]], SETTINGS, pipelining=Pipelining(draft))
        before = tuple(sequence.history[len(PROMPT) :])
        token = sequence.sample(logits, 9, LOOPS).token_id
        yield Drawn(before, token, early.get(before))


@pytest.fixture(scope="module")
def drawn(runtime: Runtime) -> list[Drawn]:
    return draw(runtime, 1, ANSWERS)


def deviation(drawn: Sequence[Drawn], plain: Probabilities) -> float:
    """Return by how many standard deviations the tokens are too far from what plain decoding expects.

    The larger of two chi-squares: of the tokens, and of their ranks by probability. It is transformed to a standard
    normal value (Wilson and Hilferty).
    """
    counts = Counter((one.before, one.token) for one in drawn)
    seen, due = np.zeros((2, VOCABULARY)), np.zeros((2, VOCABULARY))
    for before, probabilities in plain.items():
        times = np.array([counts[before, token] for token in range(VOCABULARY)])
        for row, order in enumerate((np.arange(VOCABULARY), np.argsort(-probabilities))):
            seen[row] += times[order]
            due[row] += times.sum() * probabilities[order]
    free = VOCABULARY - 1
    largest = float(((seen - due) ** 2 / due).sum(axis=1).max()) / free
    spread: float = 2 / (9 * free)
    return (largest ** (1 / 3) - (1 - spread)) / spread**0.5


def test_pipelined_sampling_has_the_distribution_of_plain_sampling(drawn: list[Drawn], plain: Probabilities) -> None:
    assert len(drawn) == ANSWERS * (TOKENS - 1)
    assert deviation(drawn, plain) < 3


def test_a_fault_of_one_percent_is_seen(drawn: list[Drawn], plain: Probabilities) -> None:
    """A token is drawn too rarely by one percent of all tokens, and another too often."""
    random, share = np.random.default_rng(2), sum(one.token == 0 for one in drawn) / len(drawn)

    def moved(one: Drawn) -> Drawn:
        return one._replace(token=1) if one.token == 0 and random.random() < 0.01 / share else one

    assert deviation([moved(one) for one in drawn], plain) > 5


def test_drafts_that_are_sometimes_accepted_unseen_are_seen(drawn: list[Drawn], plain: Probabilities) -> None:
    random = np.random.default_rng(3)

    def accepted(one: Drawn) -> Drawn:
        if one.early is None or random.random() > 0.1:
            return one
        return one._replace(token=int(random.choice(VOCABULARY, p=softmax(one.early))))

    assert deviation([accepted(one) for one in drawn], plain) > 5


def test_logits_of_the_loop_before_the_last_are_seen(
    runtime: Runtime, plain: Probabilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Pipeline._count

    def stale(self: Pipeline, slot: int, *rest: Any) -> None:
        before = [
            (flight, None if flight.logits is None else flight.logits.copy())
            for flight in self._sequences[slot].flights
        ]
        count(self, slot, *rest)
        for flight, logits in before:
            if flight.left and logits is not None:
                flight.logits = logits

    monkeypatch.setattr(Pipeline, "_count", stale)
    assert deviation(draw(runtime, 4, ANSWERS // 10), plain) > 5
