"""Errors name the field that the client sent, and say of a prompt that does not fit what OpenAI's clients look for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError
from serving import WAIT, Server

LONG = "abc " * 3_000  # over the 8,192 tokens of the cache
HELLO = [{"role": "user", "content": "Hello"}]
PATHS = {"prompt": "completions", "messages": "chat/completions", "input": "responses"}
OF_LIST = {"type": "array", "items": {}}


@pytest.fixture(scope="module")
def server(served_package: Path) -> Iterator[Server]:
    with Server(served_package, "--max-tokens", 40) as running:
        yield running


def refusal(server: Server, body: dict[str, Any], path: str | None = None) -> dict[str, Any]:
    """The error of a request that is refused."""
    path = path or next(one for field, one in PATHS.items() if field in body)
    reply = httpx.post(f"{server.url}/v1/{path}", json={"model": "tiny", **body}, timeout=WAIT)
    assert reply.status_code == 400, reply.text
    return dict(reply.json()["error"])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "abc", "max_tokens": 41}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": 41}, "max_tokens"),
        ({"messages": HELLO, "max_completion_tokens": 41}, "max_completion_tokens"),
        ({"messages": HELLO, "max_completion_tokens": 41, "stream": True}, "max_completion_tokens"),
        ({"input": "Hello", "max_output_tokens": 41}, "max_output_tokens"),
        ({"input": "Hello", "max_output_tokens": 41, "stream": True}, "max_output_tokens"),
    ],
    ids=str,
)
def test_an_error_about_the_most_tokens_names_the_field_that_the_client_sent(
    server: Server, body: dict[str, Any], field: str
) -> None:
    error = refusal(server, body)
    assert error["param"] == field
    assert error["message"] == f"{field} is 41; this server allows 40"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": [{"type": "function", "name": "f", "parameters": OF_LIST}]}, "tools.0.parameters.type"),
        ({"tools": [{"type": "function", "name": "f"}] * 2}, "tools"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}] * 513},
            "input",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_a_chat_would_refuse_of_a_response_is_told_in_the_responses_fields(
    server: Server, change: dict[str, Any], field: str
) -> None:
    error = refusal(server, {"input": "Hello", **change})
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: ")
    assert "messages" not in error["message"]


def test_a_text_that_is_too_long_to_tokenize_is_named_as_it_was_sent(server: Server) -> None:
    text = "a" * 600_000
    asked: list[tuple[str, Any]] = [("prompt", text), ("messages", [{"role": "user", "content": text}])]
    for field, value in asked:
        reply = httpx.post(f"{server.url}/tokenize", json={field: value}, timeout=WAIT)
        assert reply.json()["error"]["param"] == field


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": LONG},
        {"prompt": LONG * 50},
        {"prompt": [5] * 9_000},
        {"prompt": ["abc", LONG]},
        {"messages": [{"role": "user", "content": LONG}]},
        {"messages": HELLO * 10_000},
        {"input": LONG},
        {"input": [{"role": "user", "content": LONG}]},
    ],
    ids=lambda body: f"{next(iter(body))}-{len(str(body))}",
)
def test_a_prompt_that_does_not_fit_has_the_code_that_agents_look_for(
    server: Server, body: dict[str, Any], stream: bool
) -> None:
    error = refusal(server, {**body, "stream": stream})
    assert error["code"] == "context_length_exceeded"
    assert error["type"] == "invalid_request_error"
    assert error["param"] == next(iter(body))
    assert "do not fit" in error["message"]


def test_a_text_to_embed_that_does_not_fit_has_it_too(server: Server) -> None:
    error = refusal(server, {"input": ["abc", LONG]}, "embeddings")
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


def test_another_fault_of_a_prompt_has_another_code(server: Server) -> None:
    for body in ({"prompt": [10**6]}, {"prompt": ""}, {"prompt": []}):
        assert refusal(server, body)["code"] != "context_length_exceeded"


def test_the_official_client_hears_that_its_stream_does_not_fit(server: Server) -> None:
    with pytest.raises(BadRequestError) as caught:
        server.client().responses.create(model="tiny", input=LONG, stream=True)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
