"""Embeddings as OpenAI's client asks for them: the mean of the last loop's hidden states."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
from melt_runtime import Runtime
from openai import OpenAI
from serving import WAIT, Server

TEXTS = ["The quick brown fox", "abc", "a", "Hello, world", "One more than there are slots"]


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


def mean(runtime: Runtime, text: str, **options: Any) -> np.ndarray:
    return np.asarray(runtime.loops(text, logits=False, **options).hidden[-1].mean(axis=0))


def test_an_embedding_is_the_mean_of_the_last_loops_hidden_states(client: OpenAI, served_runtime: Runtime) -> None:
    for form in ({}, {"encoding_format": "float"}):  # the client asks for base64 by itself
        reply = client.embeddings.create(model="tiny", input=TEXTS, **form)  # type: ignore[arg-type]
        assert [one.index for one in reply.data] == list(range(5))
        for one, text in zip(reply.data, TEXTS, strict=True):
            assert one.embedding == pytest.approx(mean(served_runtime, text).tolist(), rel=1e-3, abs=1e-4)
        assert reply.usage.prompt_tokens == sum(map(len, TEXTS))
        assert reply.model_extra == {"pooling": "mean of the last loop's hidden states"}


def test_one_text_and_token_ids_are_the_same(client: OpenAI, served_runtime: Runtime) -> None:
    ids = served_runtime.encode("Hello")
    found = [client.embeddings.create(model="tiny", input=given).data[0].embedding for given in ("Hello", ids, [ids])]
    assert found[0] == found[1] == found[2]


def test_the_depth_may_be_asked_for(client: OpenAI, served_runtime: Runtime) -> None:
    reply = client.embeddings.create(model="tiny", input="Hello", extra_body={"loops": 2})
    expected = mean(served_runtime, "Hello", loops=2).tolist()
    assert reply.data[0].embedding == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert mean(served_runtime, "Hello").tolist() != pytest.approx(expected, rel=1e-2, abs=1e-2)
    assert client.embeddings.create(model="tiny", input="Hello", dimensions=64).data[0].embedding


def test_the_time_of_a_call_is_that_of_all_its_texts(server: Server) -> None:
    body = {"model": "tiny", "input": ["a" * 200] * 2048, "max_seconds": 3}
    reply = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=WAIT)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"dimensions": 32}, "dimensions"),
        ({"input": []}, None),
        ({"input": ""}, None),
        ({"input": ["a", ""]}, None),
        ({"input": [10**6]}, None),
        ({"input": "a" * 9000}, None),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"loops": 17}, "loops"),
        ({"temperature": 1}, "temperature"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_embedded_is_refused(server: Server, change: dict[str, Any], param: str | None) -> None:
    body = {"model": "tiny", "input": "abc", **change}
    reply = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=WAIT)
    assert reply.status_code == 400, reply.text
    assert param is None or reply.json()["error"]["param"].startswith(param)
    assert httpx.post(f"{server.url}/v1/embeddings", json=body | {"model": "other"}, timeout=WAIT).status_code in (
        400,
        404,
    )
