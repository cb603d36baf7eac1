"""The sampler: what its filters keep, that its draws follow the distribution, and that they can be repeated."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from melt_runtime.errors import ArgumentError
from melt_runtime.sampling.sampler import Sampler, SamplingParams

KNOWN = np.log(np.array([0.05, 0.5, 0.15, 0.3], dtype=np.float32))

rows = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))


def draws(logits: np.ndarray, count: int, history: list[int] | None = None, **params: Any) -> list[int]:
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "seed": 7, **params}))
    return [sampler.sample(logits, history or []) for _ in range(count)]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"frequency_penalty": 2.1},
        {"presence_penalty": math.nan},
        {"presence_penalty": "1"},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": 1.0},
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(params: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(params))):
        SamplingParams(**params)


def test_numpy_numbers_are_accepted_as_parameters() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int64(1))  # type: ignore[arg-type]
    assert Sampler(params).sample(np.array([0.0, 50.0, 0.0, 0.0])) == 1


def test_a_negative_stream_is_refused() -> None:
    with pytest.raises(ArgumentError, match="stream"):
        Sampler(SamplingParams(), stream=-1)


@given(rows)
def test_greedy_takes_the_likeliest_token(logits: np.ndarray) -> None:
    assert Sampler(SamplingParams()).sample(logits, []) == int(np.argmax(logits))


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    assert Sampler(SamplingParams()).sample(np.array([1.0, 3.0, 3.0]), []) == 1


@given(rows, st.integers(0, 2**32))
def test_top_k_of_one_equals_greedy_even_among_equals(logits: np.ndarray, seed: int) -> None:
    rounded = np.round(logits)
    assert draws(rounded, 1, top_k=1, seed=seed) == [int(np.argmax(rounded))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_of_the_scaled_logits(temperature: float) -> None:
    count = 20_000
    expected = np.exp(KNOWN.astype(np.float64) / temperature)
    expected /= expected.sum()
    seen = np.bincount(draws(KNOWN, count, temperature=temperature), minlength=4)
    # Pearson's statistic with 3 degrees of freedom exceeds 21.1 in 1 of 10,000 seeds.
    assert ((seen - count * expected) ** 2 / (count * expected)).sum() < 21.1


def test_a_tiny_temperature_is_greedy_and_not_nan() -> None:
    assert set(draws(np.array([-1e30, 5.0, 4.999], dtype=np.float32), 50, temperature=5e-324)) == {1}


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.49}, {1}),
        ({"top_p": 0.51}, {1, 3}),
        ({"top_p": 0.79}, {1, 3}),
        ({"top_p": 0.81}, {1, 2, 3}),
        ({"top_p": 0.96}, {0, 1, 2, 3}),
        ({"top_p": 1e-300}, {1}),
        ({"min_p": 0.29}, {1, 2, 3}),
        ({"min_p": 0.31}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        # After top-k the rest is renormalised: 0.5 and 0.3 become 0.625 and 0.375.
        ({"top_k": 2, "top_p": 0.62}, {1}),
        ({"top_k": 3, "min_p": 0.31}, {1, 3}),
        ({"top_p": 0.81, "min_p": 0.59}, {1, 3}),
    ],
)
def test_filters_keep_exactly_the_expected_ids(params: dict[str, Any], kept: set[int]) -> None:
    assert set(draws(KNOWN, 2000, **params)) == kept


def test_top_k_keeps_exactly_k_of_equal_tokens_lowest_ids_first() -> None:
    assert set(draws(np.zeros(10, dtype=np.float32), 500, top_k=3)) == {0, 1, 2}


@settings(deadline=None)  # hundreds of draws an example
@given(rows, st.floats(0.01, 0.99))
def test_top_p_keeps_a_smallest_set_that_reaches_the_mass(logits: np.ndarray, top_p: float) -> None:
    weights = np.exp(logits.astype(np.float64))
    ordered = np.sort(weights / weights.sum())[::-1]
    size = int(np.searchsorted(np.cumsum(ordered), top_p - 1e-9)) + 1
    assert len(set(draws(logits, 200, top_p=top_p))) <= size + 1
    assert all(weights[i] / weights.sum() >= ordered[size - 1] - 1e-9 for i in draws(logits, 50, top_p=top_p - 2e-9))


def test_top_p_keeps_exactly_enough_of_equal_tokens_lowest_ids_first() -> None:
    assert set(draws(np.zeros(64, dtype=np.float32), 2000, top_p=0.5)) == set(range(32))


def test_tokens_of_minus_infinity_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf], dtype=np.float32)
    assert set(draws(logits, 500)) == {1, 3}


def test_the_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    assert sampler.sample(np.array([3.0, 2.0, 1.0]), [0, 0, 0]) == 1
    assert sampler.sample(np.array([3.0, 1.4, 1.0]), [0, 0, 0]) == 0
    assert sampler.sample(np.array([-1.0, -1.5]), np.array([0])) == 1
    assert sampler.sample(np.array([-1.0, -2.5]), np.array([0])) == 0


def test_the_penalty_with_no_history_changes_nothing() -> None:
    assert Sampler(SamplingParams(repetition_penalty=2.0)).sample(np.array([3.0, 2.0]), []) == 0


@pytest.mark.parametrize("history", [[4], [-1], [0.5]])
def test_history_that_is_not_ids_of_the_vocabulary_is_refused(history: list[Any]) -> None:
    with pytest.raises(ArgumentError, match="history"):
        Sampler(SamplingParams(repetition_penalty=2.0)).sample(KNOWN, history)


def test_count_penalties_are_subtracted_for_what_was_generated_and_not_for_the_prompt() -> None:
    logits = np.array([3.0, 2.0, 1.0])
    once = Sampler(SamplingParams(presence_penalty=1.5), prompt_tokens=2)
    assert once.sample(logits, [0, 0]) == 0
    assert once.sample(logits, [0, 0, 0]) == 1
    assert once.sample(logits, [1, 1, 0, 0, 0, 1]) == 0  # all lose the same, however often they came
    often = Sampler(SamplingParams(frequency_penalty=0.4), prompt_tokens=1)
    assert [often.sample(logits, [0] * count) for count in (1, 3, 4, 5)] == [0, 0, 1, 1]
    both = Sampler(SamplingParams(frequency_penalty=0.4, presence_penalty=0.7))
    assert both.adjusted(logits, [0, 0, 2]).tolist() == pytest.approx([3 - 0.8 - 0.7, 2, 1 - 0.4 - 0.7])
    assert Sampler(SamplingParams(presence_penalty=-2)).sample(logits, [2, 2]) == 0
    assert Sampler(SamplingParams(frequency_penalty=-2)).sample(logits, [2, 2]) == 2


def test_a_bias_is_added_before_everything_else_and_cannot_free_a_forbidden_token() -> None:
    logits = np.array([3.0, 2.0, -np.inf])
    assert Sampler(SamplingParams(logit_bias={0: -2, 2: 100})).sample(logits) == 1
    assert set(draws(KNOWN, 200, logit_bias={1: -100, 3: -100})) <= {0, 2}
    assert set(draws(KNOWN, 200, logit_bias={"2": 100.0}, top_k=1)) == {2}
    assert SamplingParams(logit_bias={1: 2}) == SamplingParams(logit_bias={"1": 2.0, 5: 0})


@pytest.mark.parametrize(
    "bias", [5, [1], {-1: 1.0}, {"a": 1.0}, {"²": 1.0}, {1.5: 1.0}, {True: 1.0}, {1: math.nan}, {1: "2"}, {9**99: "a"}]
)
def test_a_bias_that_is_not_numbers_by_token_is_refused(bias: Any) -> None:
    with pytest.raises(ArgumentError, match="logit_bias"):
        SamplingParams(logit_bias=bias)


def test_a_bias_of_a_token_that_there_is_not_is_refused() -> None:
    with pytest.raises(ArgumentError, match="names token 4; the last is 3"):
        Sampler(SamplingParams(logit_bias={4: 1.0})).sample(KNOWN)


@pytest.mark.parametrize("params", [{"logit_bias": {0: 1e308}}, {}])
def test_logits_that_become_infinite_are_refused(params: dict[str, Any]) -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=1e-308, temperature=1, **params))
    with pytest.raises(ArgumentError, match="infinite"):
        sampler.sample(np.array([5.0, 1.0]), [0])


@given(rows)
def test_the_logits_are_never_modified(logits: np.ndarray) -> None:
    before = logits.copy()
    draws(
        logits,
        3,
        history=[0],
        top_k=2,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=1,
        logit_bias={0: 1},
    )
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_read_only_logits_of_any_precision_work(dtype: type) -> None:
    logits = KNOWN.astype(dtype)
    logits.flags.writeable = False
    assert set(draws(logits, 500, top_k=2, repetition_penalty=1.1, history=[2])) == {1, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([0.0, math.nan, 1.0], "NaN logits"),
        ([0.0, math.inf], "infinite logits"),
        ([-math.inf, -math.inf], "all -inf"),
        ([], "one row"),
        ([[0.0, 1.0]], "one row"),
    ],
)
def test_logits_that_give_no_token_are_refused(logits: list[Any], message: str, temperature: float) -> None:
    with pytest.raises(ArgumentError, match=message):
        draws(np.array(logits), 1, temperature=temperature)


def test_the_same_seed_and_stream_give_the_same_draws() -> None:
    assert draws(KNOWN, 200) == draws(KNOWN, 200)


def test_other_seeds_streams_and_no_seed_give_other_draws() -> None:
    def run(seed: int | None, stream: int) -> tuple[int, ...]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), stream)
        return tuple(sampler.sample(KNOWN) for _ in range(200))

    runs = [run(1, 0), run(1, 1), run(2, 0), run(2, 1), run(None, 0), run(None, 0)]
    assert len(set(runs)) == len(runs)


@given(st.integers(0, 2**64), st.integers(0, 1000), st.integers(0, 20))
def test_a_restored_state_continues_identically(seed: int, stream: int, before: int) -> None:
    params = SamplingParams(temperature=1.0, seed=seed)
    first, second = Sampler(params, stream), Sampler(params, stream + 1)
    for _ in range(before):
        first.sample(KNOWN)
    second.restore(json.loads(json.dumps(first.state())))
    assert [first.sample(KNOWN) for _ in range(20)] == [second.sample(KNOWN) for _ in range(20)]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"bit_generator": "MT19937"},
        {"bit_generator": "PCG64", "state": {"state": "x", "inc": 1}, "has_uint32": 0, "uinteger": 0},
        {"bit_generator": "PCG64", "state": {"state": 1 << 200, "inc": 1}, "has_uint32": 0, "uinteger": 0},
        {"bit_generator": "PCG64", "state": 3, "has_uint32": 0, "uinteger": 0},
        "not a state",
        None,
    ],
)
def test_a_broken_state_is_refused_and_changes_nothing(state: Any) -> None:
    sampler = Sampler(SamplingParams(seed=3))
    before = sampler.state()
    with pytest.raises(ArgumentError, match="saved sampler state"):
        sampler.restore(state)
    assert sampler.state() == before


def test_a_greedy_choice_leaves_the_random_state_alone() -> None:
    sampler = Sampler(SamplingParams(seed=3))
    before = sampler.state()
    sampler.sample(KNOWN)
    assert sampler.state() == before


def test_every_draw_takes_one_random_number_whatever_the_filters() -> None:
    plain = Sampler(SamplingParams(temperature=1.0, seed=3))
    filtered = Sampler(SamplingParams(temperature=0.5, top_k=2, top_p=0.9, min_p=0.1, seed=3))
    plain.sample(KNOWN)
    filtered.sample(KNOWN)
    assert plain.state() == filtered.state()
