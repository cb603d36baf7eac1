"""What a request may say: what asks for nothing is accepted, and what cannot be honoured is refused by its name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI
from serving import WAIT, Server

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
TEXT: Any = {"model": "tiny", "prompt": "abc", "max_tokens": 2}


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


def refusal(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """The error of a request that is refused."""
    path = "chat/completions" if "messages" in body else "completions"
    reply = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=WAIT)
    assert reply.status_code == 400, reply.text
    return dict(reply.json()["error"])


NOTHING: list[dict[str, Any]] = [
    {"tools": None},
    {"tools": []},
    {"tool_choice": None},
    {"tool_choice": "none"},
    {"parallel_tool_calls": True},
    {"parallel_tool_calls": False},
    {"functions": None},
    {"function_call": "none"},
    {"modalities": ["text"]},
    {"stream": True, "stream_options": {"include_obfuscation": False}},
    {"service_tier": "auto"},
    {"user": "somebody"},
    {"metadata": {"of": "theirs"}},
    {"store": False},
    {"audio": None, "prediction": None, "web_search_options": None, "reasoning_effort": None, "verbosity": None},
    {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
    {"logit_bias": {"5": 0}},
    {"safety_identifier": "a", "prompt_cache_key": "b"},
    {"stop": []},
    {"stop": None},
]


@pytest.mark.parametrize("fields", NOTHING, ids=str)
def test_a_chat_may_say_what_asks_for_nothing(server: Server, fields: dict[str, Any]) -> None:
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | fields, timeout=WAIT)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("fields", [{"suffix": ""}, {"echo": False}, {"best_of": 1}, {"n": 2, "best_of": 2}], ids=str)
def test_a_completion_may_say_what_asks_for_nothing(server: Server, fields: dict[str, Any]) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", json=TEXT | fields, timeout=WAIT)
    assert reply.status_code == 200, reply.text


def test_the_message_of_a_reply_can_be_sent_back(client: OpenAI) -> None:
    said = client.chat.completions.create(**CHAT).choices[0].message
    whole: Any = {**said.model_dump(), "refusal": None, "audio": None, "annotations": [], "tool_calls": []}
    whole |= {"reasoning": None, "reasoning_content": None}
    assert set(said.model_dump()) >= {"refusal", "annotations", "audio", "function_call", "tool_calls"}
    expected = None
    for again in ({"role": "assistant", "content": said.content}, said.model_dump(), whole):
        reply = client.chat.completions.create(**CHAT | {"messages": [*HELLO, again, *HELLO], "temperature": 0})
        expected = expected or reply.choices[0].message.content
        assert reply.choices[0].message.content == expected


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"tool_choice": "required"}, "tool_choice", "it needs tools"),
        ({"functions": [{"name": "f"}]}, "functions", "give tools"),
        ({"modalities": ["text", "audio"]}, "modalities", "answers are text"),
        ({"store": True}, "store", "stores no replies"),
        ({"max_tokns": 5}, "max_tokns", "is it 'max_tokens'?"),
        ({"stop": 5}, "stop", "text or a list of texts"),
        ({"stop": ["a", 5]}, "stop.1", "valid string"),
        ({"stop": ["a"] * 257}, "stop", "at most 256"),
        ({"stop": "a" * 8193}, "stop", "at most 8192"),
        ({"stream_options": {}}, "stream_options", "belong to a stream"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, None, "an object, true or false"),
        ({"temperature": 10**400}, "temperature", "valid number"),
        ({"loops": 10**400}, "loops", "less than or equal"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_with_its_reason(
    server: Server, fields: dict[str, Any], param: str | None, sentence: str
) -> None:
    error = refusal(server, CHAT | fields)
    assert sentence in error["message"]
    assert param is None or error["param"] == param


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("message", "param", "sentence"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}, "content.1", "images are not supported"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "content.0", "audio is not supported"),
        ({"role": "user", "content": [{"type": "odd"}]}, "content.0.type", "'text'"),
        ({"role": "user", "content": ["a"]}, "content.0", "must be an object"),
        ({"role": "user", "content": 5}, "content", "text or a list of parts"),
        ({"role": "user"}, "content", "missing"),
        ({"role": "tool"}, "content", "missing"),
        ({"role": "function", "content": "a"}, "role", "the role is tool"),
        ({"role": "assistant", "content": "a", "tool_calls": [{}]}, "tool_calls.0.id", "required"),
        ({"role": "assistant", "content": "a", "function_call": {}}, "function_call", "give tool_calls"),
        ({"role": "user", "content": "a", "colour": "red"}, "colour", "no such field"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_message_is_said_of_the_branch_that_fits(
    server: Server, message: Any, param: str, sentence: str
) -> None:
    error = refusal(server, CHAT | {"messages": [*HELLO, message]})
    assert error["param"].startswith(f"messages.1.{param}")
    assert sentence in error["message"]
    assert "~" not in error["message"]


@pytest.mark.parametrize(
    ("prompt", "param"),
    [(5, "prompt"), (None, "prompt"), (["a", 1], "prompt.1"), ([1, "a"], "prompt.1"), ([[1, "b"]], "prompt.0.1")],
)
def test_what_is_wrong_with_a_prompt_is_said_of_the_kind_that_it_is(server: Server, prompt: Any, param: str) -> None:
    assert refusal(server, TEXT | {"prompt": prompt})["param"] == param


def test_of_many_wrong_things_the_first_is_said_alone(server: Server) -> None:
    for body in (
        TEXT | {f"x{at}": 1 for at in range(20000)},
        TEXT | {"prompt": ["a", *[5] * 100000]},
        CHAT | {"messages": [{"role": "user"}] * 20000},
    ):
        assert len(refusal(server, body)["message"]) < 200


@pytest.mark.parametrize("value", ["9" * 5000, "1e999", "NaN", "-Infinity"])
def test_numbers_that_are_none_are_refused(server: Server, value: str) -> None:
    for field in ("loops", "seed", "temperature", "max_seconds", "n"):
        body = f'{{"model": "tiny", "prompt": "a", "{field}": {value}}}'
        headers = {"Content-Type": "application/json"}
        assert httpx.post(f"{server.url}/v1/completions", content=body, headers=headers).status_code == 400


def test_the_official_client_hears_of_it_as_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="images are not supported"):
        client.chat.completions.create(**CHAT | {"messages": [{"role": "user", "content": [IMAGE]}]})
