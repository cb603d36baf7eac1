"""Completions that repeat and score their prompt, change logits, and pick the best of several."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
from melt_runtime import Runtime
from openai import OpenAI
from serving import WAIT, Server

TEXT = "The quick brown fox jumps"  # four chunks
ASKED: Any = {"model": "tiny", "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


def logprobs(runtime: Runtime, ids: list[int]) -> np.ndarray:
    """Return what the model says after each token: (tokens, vocab)."""
    logits = runtime.loops(ids).logits
    assert logits is not None
    shifted = logits[-1].astype(np.float64) - logits[-1].max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def test_a_prompt_is_scored_without_a_token_more(client: OpenAI, served_runtime: Runtime) -> None:
    ids = served_runtime.encode(TEXT)
    expected = logprobs(served_runtime, ids)
    for _ in range(2):  # the second time, its beginning is in the prefix cache
        reply = client.completions.create(prompt=TEXT, **{**ASKED, "max_tokens": 0}, echo=True, logprobs=2)
        (choice,) = reply.choices
        assert (choice.text, choice.finish_reason) == (TEXT, "length")
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (25, 0)
        found = choice.logprobs
        assert found is not None
        assert found.tokens == list(TEXT)
        assert found.text_offset == list(range(25))
        assert found.token_logprobs is not None
        assert found.top_logprobs is not None
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        for at in range(1, 25):
            assert found.token_logprobs[at] == pytest.approx(expected[at - 1, ids[at]], abs=1e-4)
            likeliest = sorted(expected[at - 1])[-2:]
            assert sorted(found.top_logprobs[at].values()) == pytest.approx(likeliest, abs=1e-4)


def test_an_answer_follows_the_prompt_that_is_repeated(client: OpenAI, served_runtime: Runtime) -> None:
    plain = client.completions.create(prompt=TEXT, **ASKED, logprobs=1).choices[0]
    whole = client.completions.create(prompt=TEXT, **ASKED, echo=True, logprobs=1).choices[0]
    assert whole.text == TEXT + plain.text
    assert plain.logprobs is not None
    assert whole.logprobs is not None
    assert whole.logprobs.tokens == [*TEXT, *(plain.logprobs.tokens or ())]
    assert whole.logprobs.token_logprobs[25:] == plain.logprobs.token_logprobs  # type: ignore[index]
    assert whole.logprobs.text_offset[25:] == [25 + at for at in plain.logprobs.text_offset or ()]  # type: ignore[index]
    assert client.completions.create(prompt=TEXT, **ASKED, echo=True).choices[0].logprobs is None


@pytest.mark.parametrize("max_tokens", [0, 1, 12])
def test_a_stream_repeats_and_scores_the_prompt_first(client: OpenAI, max_tokens: int) -> None:
    asked: Any = {"prompt": [TEXT, "abc"], **ASKED, "max_tokens": max_tokens, "echo": True, "logprobs": 3, "n": 2}
    whole = client.completions.create(**asked).choices
    texts, entries, ends = ([""] * 4, [[] for _ in range(4)], [""] * 4)  # type: ignore[var-annotated]
    for part in client.completions.create(**asked, stream=True):
        for choice in part.choices:
            texts[choice.index] += choice.text
            entries[choice.index] += (choice.logprobs and choice.logprobs.token_logprobs) or []
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [one.text for one in whole]
    assert entries == [one.logprobs.token_logprobs for one in whole]  # type: ignore[union-attr]
    assert ends == ["length"] * 4


def test_a_prompt_of_token_ids_is_repeated_as_text(client: OpenAI, served_runtime: Runtime) -> None:
    ids = served_runtime.encode("Hello")
    asked = {**ASKED, "max_tokens": 0}
    assert client.completions.create(prompt=ids, **asked, echo=True).choices[0].text == "Hello"
    assert [one.text for one in client.completions.create(prompt=[ids, ids[:2]], **asked, echo=True).choices] == [
        "Hello",
        "He",
    ]
    assert client.completions.create(prompt=ids, **asked).choices[0].text == ""


def test_lm_evals_requests_give_what_it_sums(server: Server, served_runtime: Runtime) -> None:
    """As lm_eval's local-completions sends them: token ids, one token more, which it leaves out."""
    contexts, whole = ["abc d", "x"], ["abc def", "xyz."]
    ids = [served_runtime.encode(text) for text in whole]
    body = {
        "model": "tiny",
        "prompt": ids,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    reply = httpx.post(f"{server.url}/v1/completions", json={**body, "echo": True}, timeout=WAIT).json()
    for choice, context, tokens in zip(reply["choices"], contexts, ids, strict=True):
        start = len(context)
        found = choice["logprobs"]["token_logprobs"][start:-1]
        expected = logprobs(served_runtime, tokens)
        right = [expected[at - 1, tokens[at]] for at in range(start, len(tokens))]
        assert found == pytest.approx(right, abs=1e-4)
        greedy = all(int(expected[at - 1].argmax()) == tokens[at] for at in range(start, len(tokens)))
        tops = choice["logprobs"]["top_logprobs"][start:-1]
        names = choice["logprobs"]["tokens"][start:-1]
        assert greedy == all(max(top, key=top.get) == name for top, name in zip(tops, names, strict=True))


@pytest.mark.parametrize(
    "changed",
    [
        {"frequency_penalty": 1.2},
        {"presence_penalty": 2, "frequency_penalty": -0.5},
        {"logit_bias": {"40": 9, "41": -100}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_penalties_and_biases_are_the_runtimes(
    client: OpenAI, served_runtime: Runtime, changed: dict[str, Any]
) -> None:
    reply = client.completions.create(prompt=TEXT, **{**ASKED, "max_tokens": 30}, **changed)
    expected = served_runtime.generate(TEXT, max_tokens=30, ignore_eos=True, **changed)
    assert reply.choices[0].text == expected.text
    assert expected.text != served_runtime.generate(TEXT, max_tokens=30, ignore_eos=True).text


def test_a_bias_of_a_hundred_is_the_answer(client: OpenAI, served_runtime: Runtime) -> None:
    (token,) = served_runtime.encode("Q")
    messages: Any = [{"role": "user", "content": "Hello"}]
    reply = client.chat.completions.create(
        messages=messages, **{**ASKED, "temperature": 1}, logit_bias={str(token): 100}
    )
    assert reply.choices[0].message.content == "Q" * 12


def test_the_best_are_those_whose_tokens_are_likeliest(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": ["abc", TEXT], "seed": 3, "max_tokens": 8, "temperature": 1.3}
    asked["extra_body"] = {"ignore_eos": True}
    every = client.completions.create(**asked, n=5, logprobs=0).choices
    best = client.completions.create(**asked, best_of=5, n=2)
    expected = []
    for first in (0, 5):
        by_mean = sorted(every[first : first + 5], key=lambda one: -np.mean(one.logprobs.token_logprobs))  # type: ignore
        expected += [one.text for one in by_mean[:2]]
    assert [one.text for one in best.choices] == expected
    assert [one.index for one in best.choices] == [0, 1, 2, 3]
    assert all(one.logprobs is None for one in best.choices)
    assert best.usage is not None
    assert best.usage.completion_tokens == 80
