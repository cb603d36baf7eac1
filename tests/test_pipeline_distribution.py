"""Sampling with pipelined decoding has plain decoding's distribution, to 1% of a token's probability."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import LoopSettings, Runtime
from melt_runtime.decoding.loop_driver import LoopDriver
from melt_runtime.decoding.pipeline import Pipelining
from melt_runtime.sampling.sampler import Sampler, SamplingParams
from numpy.typing import NDArray

LOOPS, VOCABULARY = 3, 5
PROMPT = [1, 3, 0, 2]
DRAWN = 3  # tokens of an answer
ANSWERS = 20_000
SAMPLING = SamplingParams(temperature=1.0, seed=7)
SETTINGS = LoopSettings(LOOPS)
Answer = tuple[int, ...]
# A token that is drawn in place of another: (random number, the token, what its draft was)
Fault = Callable[[float, int, int | None], int]


@pytest.fixture(scope="module")
def runtime(make_package: MakePackage, make_looplm: MakeCheckpoint) -> Runtime:
    shape = {"vocab_size": VOCABULARY, "total_ut_steps": LOOPS, "num_hidden_layers": 1, "initializer_range": 0.2}
    return Runtime.load(make_package(make_looplm(**shape), max_seq_len=16, chunk=8), threads=1)


@pytest.fixture(scope="module")
def expected(runtime: Runtime) -> dict[Answer, float]:
    """The probability of every answer, from plain decoding's logits."""
    driver = runtime.driver()

    def after(tokens: Sequence[int]) -> NDArray[np.float64]:
        driver.reset()
        logits = driver.append([PROMPT], SETTINGS)[0]
        for token in tokens:
            logits = driver.advance([[token]], SETTINGS).row(0)
        weights = np.exp(logits.astype(np.float64) - logits.max())
        return weights / weights.sum()

    found: dict[Answer, float] = {(): 1.0}
    for _ in range(DRAWN):
        found = {
            (*answer, token): chance * share
            for answer, chance in found.items()
            for token, share in enumerate(after(answer).tolist())
        }
    return found


def answers(runtime: Runtime, pipelined: bool, seed: int, fault: Fault | None = None) -> Iterator[Answer]:
    """Yield answers, each drawn with random numbers of its own."""
    driver = runtime.driver()
    driver.append([PROMPT], SETTINGS)
    first, between = driver.append([[PROMPT[-1]]], SETTINGS), np.random.default_rng(seed)
    driver.truncate(0, len(PROMPT))
    del first
    for stream in range(ANSWERS):
        yield answer(driver, Sampler(SamplingParams(temperature=1.0, seed=seed), stream), pipelined, fault, between)


def answer(
    driver: LoopDriver, sampler: Sampler, pipelined: bool, fault: Fault | None, between: np.random.Generator
) -> Answer:
    raise NotImplementedError
