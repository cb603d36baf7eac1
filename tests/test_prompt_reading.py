"""What a request reads of its prompt: log probabilities and the mean of the hidden states, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import MeanHidden, PrefixCache, PromptLogprobs, Request, Runtime, Scheduler
from numpy.typing import NDArray

PROMPT = [(7 * i) % 43 + 3 for i in range(27)]  # three chunks of 8 and one of 3


@pytest.fixture(scope="module", params=["melt", "looplm", "standard", "fp16", "huginn"])
def runtime(
    make_package: MakePackage,
    make_checkpoint: MakeCheckpoint,
    make_looplm: MakeCheckpoint,
    make_runtime: Callable[..., Runtime],
    request: pytest.FixtureRequest,
) -> Runtime:
    if request.param == "huginn":  # a coda stands between its last loop and its head
        return make_runtime("huginn", max_batch=3)
    if request.param == "looplm":
        return Runtime.load(make_package(make_looplm(), chunk=8, max_seq_len=64, max_batch=3))
    options = {"standard": {"dialect": "standard"}, "fp16": {"precision": "fp16"}}.get(request.param, {})
    return Runtime.load(make_package(make_checkpoint(), max_seq_len=64, max_batch=3, **options))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_logprobs_are_those_of_the_model_whatever_runs_beside(runtime: Runtime) -> None:
    logits = runtime.loops(PROMPT).logits
    assert logits is not None
    expected = log_softmax(logits[-1])
    options = runtime.options(max_tokens=12, ignore_eos=True)
    with Scheduler(runtime, slots=3, prefixes=PrefixCache(1 << 22)) as scheduler:
        others = [scheduler.submit(Request(tuple(PROMPT[i:]), options)) for i in range(2)]
        for only in (True, False):  # the second time, a prefix cache has the prompt
            found = PromptLogprobs(PROMPT, 4)
            result = scheduler.submit(Request(tuple(PROMPT), options, reading=found, prompt_only=only)).result()
            assert (result.finish_reason, len(result.token_ids)) == ("length", 0 if only else 12)
            assert result.prompt_tokens == len(PROMPT)
            first, *rest = found
            assert first is None
            assert len(rest) == len(PROMPT) - 1
            for at, one in enumerate(rest):
                assert one is not None
                assert one.token == pytest.approx(expected[at, PROMPT[at + 1]], abs=2e-3)
                assert [value for _, value in one.top] == pytest.approx(-np.sort(-expected[at])[:4], abs=2e-3)
                assert all(value == pytest.approx(expected[at, token], abs=2e-3) for token, value in one.top)
        alone = [runtime.generate(PROMPT[i:], max_tokens=12, ignore_eos=True).token_ids for i in range(2)]
        assert [one.result().token_ids for one in others] == alone


def test_logprobs_are_right_while_others_are_pipelined(make_package: MakePackage, make_looplm: MakeCheckpoint) -> None:
    """Pipelined requests lay the caches of their slots side by side, and back for each visitor."""
    runtime = Runtime.load(make_package(make_looplm(), chunk=8, max_seq_len=64, max_batch=3))
    logits = runtime.loops(PROMPT).logits
    assert logits is not None
    expected = log_softmax(logits[-1])
    options = runtime.options(max_tokens=40, ignore_eos=True, pipeline="on", frequency_penalty=0.5)
    with Scheduler(runtime, slots=3) as scheduler:
        others = [scheduler.submit(Request((5, 6 + i), options)) for i in range(2)]
        next(iter(others[1]))
        for _ in range(3):
            found = PromptLogprobs(PROMPT)
            scheduler.submit(Request(tuple(PROMPT), options, reading=found, prompt_only=True)).result()
            values = [one.token for one in found if one is not None]
            right = [expected[at, PROMPT[at + 1]] for at in range(len(PROMPT) - 1)]
            assert values == pytest.approx(right, abs=2e-3)
        plain = {"max_tokens": 40, "ignore_eos": True, "pipeline": "off", "frequency_penalty": 0.5}
        for i, one in enumerate(others):
            assert one.result().token_ids == runtime.generate([5, 6 + i], **plain).token_ids  # type: ignore[call-overload]


def test_a_read_prompt_is_continued_as_any_other(runtime: Runtime) -> None:
    options = runtime.options(max_tokens=9, ignore_eos=True)
    with Scheduler(runtime, slots=2) as scheduler:
        handle = scheduler.submit(Request(tuple(PROMPT), options, reading=PromptLogprobs(PROMPT), logprobs=0))
        assert handle.result() == runtime.generate(PROMPT, max_tokens=9, ignore_eos=True)


def test_the_mean_hidden_state_is_that_of_the_last_loop(runtime: Runtime) -> None:
    expected = runtime.loops(PROMPT, logits=False).hidden[-1].mean(axis=0)
    with Scheduler(runtime, slots=2) as scheduler:
        reading = MeanHidden()
        scheduler.submit(Request(tuple(PROMPT), runtime.options(), reading=reading, prompt_only=True)).result()
    assert reading.mean() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_prompt_of_one_token_has_no_logprob_and_a_mean(runtime: Runtime) -> None:
    with Scheduler(runtime, slots=2) as scheduler:
        logprobs, hidden = PromptLogprobs([5], 3), MeanHidden()
        for reading in (logprobs, hidden):
            scheduler.submit(Request((5,), runtime.options(), reading=reading, prompt_only=True)).result()
    assert list(logprobs) == [None]
    assert hidden.mean() == pytest.approx(runtime.loops([5], logits=False).hidden[-1, 0], rel=1e-3, abs=1e-3)


def test_there_are_no_more_likeliest_tokens_than_tokens(runtime: Runtime) -> None:
    with Scheduler(runtime, slots=1) as scheduler:
        found = PromptLogprobs(PROMPT, 10_000)
        scheduler.submit(Request(tuple(PROMPT), runtime.options(), reading=found, prompt_only=True)).result()
    _, second, *_ = found
    assert second is not None
    assert sorted(token for token, _ in second.top) == list(range(runtime.manifest.vocab_size))
