"""The likeliest few tokens stand for the whole row only where they give exactly what it would give."""

from __future__ import annotations

import numpy as np
import pytest
from melt_runtime import Sampler, SamplingParams
from melt_runtime.errors import ArgumentError
from melt_runtime.sampling.top_candidates import Candidates, sample_candidates

VOCAB = 400


def likeliest(row: np.ndarray, k: int, rng: np.random.Generator) -> Candidates:
    """The k largest of a row; which of equal ones are in it, and in which order, is left to chance."""
    shuffled = rng.permutation(row.size)
    ids = shuffled[np.argsort(-row[shuffled], kind="stable")[:k]]
    log_sum = np.float32(np.log(np.exp(row.astype(np.float64) - row.max()).sum()) + row.max())
    return Candidates(row[ids], ids.astype(np.int32), float(log_sum), row.size)


def rows(rng: np.random.Generator) -> np.ndarray:
    """A row of one of several kinds: flat, peaked, with many ties as half precision gives them, with -inf."""
    row = rng.normal(size=VOCAB) * rng.choice([0.1, 1.0, 4.0, 12.0])
    kind = rng.integers(4)
    if kind == 1:
        row = np.round(row * 2) / 2
    elif kind == 2:
        row = row.astype(np.float16)
    elif kind == 3:
        row[rng.permutation(VOCAB)[: rng.integers(1, VOCAB - 40)]] = -np.inf
    return row.astype(np.float32)


PARAMS = {
    "greedy": lambda rng: {},
    "greedy with a penalty": lambda rng: {"repetition_penalty": float(rng.choice([0.8, 1.1, 1.5]))},
    "top-k": lambda rng: {"temperature": 0.8, "top_k": int(rng.integers(1, 70))},
    "top-p": lambda rng: {"temperature": float(rng.choice([0.3, 1.0, 1.7])), "top_p": float(rng.uniform(0.05, 0.99))},
    "min-p": lambda rng: {"temperature": float(rng.choice([0.5, 1.0, 2.0])), "min_p": float(rng.uniform(0.01, 0.5))},
    "all": lambda rng: {
        "temperature": float(rng.uniform(0.2, 2)),
        "top_k": int(rng.choice([0, 5, 40, 500])),
        "top_p": float(rng.choice([1.0, 0.9, 0.5])),
        "min_p": float(rng.choice([0.0, 0.02, 0.2])),
        "repetition_penalty": float(rng.choice([1.0, 1.2, 0.9])),
        "presence_penalty": float(rng.choice([0.0, 0.0, 0.0, -1.5])),
        "logit_bias": {5: 9.0} if rng.random() < 0.2 else None,
    },
}


@pytest.mark.parametrize("name", PARAMS)
def test_candidates_give_the_token_of_the_whole_row_or_none(name: str) -> None:
    rng = np.random.default_rng(7)
    settled = 0
    for case in range(1500):
        params = SamplingParams(**PARAMS[name](rng), seed=case)
        row, history = rows(rng), rng.integers(0, VOCAB, 12).tolist()
        whole, few = Sampler(params), Sampler(params)
        before = few.state()
        token = sample_candidates(few, likeliest(row, 64, rng), history)
        if token is None:
            assert few.state() == before
            continue
        settled += 1
        assert token == whole.sample(row, history)
        assert few.state() == whole.state()
    assert settled > 300


def test_a_peaked_row_is_settled_by_top_p_at_any_temperature() -> None:
    rng = np.random.default_rng(0)
    row = (rng.normal(size=VOCAB) * 6).astype(np.float32)
    for temperature in (0.5, 1.0, 1.4):
        params = SamplingParams(temperature=temperature, top_p=0.9, seed=1)
        assert sample_candidates(Sampler(params), likeliest(row, 64, rng)) == Sampler(params).sample(row)


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"temperature": 1.0, "top_k": 65}])
def test_what_reaches_beyond_the_candidates_is_not_settled(params: dict[str, float]) -> None:
    row = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
    few = likeliest(row, 64, np.random.default_rng(1))
    assert sample_candidates(Sampler(SamplingParams(**params)), few) is None  # type: ignore[arg-type]


def test_a_tie_that_may_go_on_beyond_the_candidates_is_not_settled() -> None:
    row = np.zeros(VOCAB, np.float32)
    assert sample_candidates(Sampler(SamplingParams()), likeliest(row, 64, np.random.default_rng(0))) is None


def test_equal_likeliest_tokens_give_the_lowest_id() -> None:
    row = np.zeros(VOCAB, np.float32)
    row[[200, 30, 77]] = 5
    assert sample_candidates(Sampler(SamplingParams()), likeliest(row, 64, np.random.default_rng(0))) == 30


def test_a_vocabulary_within_the_candidates_is_always_settled() -> None:
    rng = np.random.default_rng(0)
    row = rng.normal(size=50).astype(np.float32)
    for params in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.95}, {"temperature": 2.0, "min_p": 0.1}):
        one, other = (Sampler(SamplingParams(**params, seed=3)) for _ in range(2))  # type: ignore[arg-type]
        assert sample_candidates(one, likeliest(row, 50, rng)) == other.sample(row)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_no_row_is_left_to_whoever_has_all_of_it(bad: float) -> None:
    row = np.zeros(8, np.float32)
    few = Candidates(np.array([bad, 0], np.float32), np.array([3, 1]), float("nan"), 8)
    assert sample_candidates(Sampler(SamplingParams()), few) is None
    row[3] = bad
    with pytest.raises(ArgumentError):
        Sampler(SamplingParams()).sample(row)


def test_a_history_outside_the_vocabulary_is_refused() -> None:
    few = likeliest(np.arange(VOCAB, dtype=np.float32), 64, np.random.default_rng(0))
    with pytest.raises(ArgumentError, match="from 0 to 399, but spans 5 to 400"):
        sample_candidates(Sampler(SamplingParams(repetition_penalty=1.1)), few, [5, 400])
