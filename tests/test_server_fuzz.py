"""Whatever a body holds, it is read or refused in one sentence; nothing else is raised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from chat_styles import LLAMA_3, QWEN_3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from melt_runtime import MeltError, Runtime, Scheduler
from melt_runtime.server.chat_schema import ChatBody
from melt_runtime.server.embeddings import EmbeddingBody, requests_of
from melt_runtime.server.failures import ApiError
from melt_runtime.server.intake import parsed
from melt_runtime.server.responses_schema import ResponsesBody
from melt_runtime.server.schema import CompletionBody
from melt_runtime.server.service import Service
from melt_runtime.server.text_schema import DetokenizeBody, TokenizeBody
from melt_runtime.text.tokenizer import TextTokenizer
from pydantic import ValidationError

KINDS = [ChatBody, CompletionBody, ResponsesBody, EmbeddingBody, TokenizeBody, DetokenizeBody]
INNER = {"role", "content", "type", "text", "schema", "ünknown", "function", "name", "arguments", "call_id", "output"}
FIELDS = sorted(INNER.union(*(kind.model_fields for kind in KINDS)))
WORDS = ["user", "assistant", "tool", "text", "image_url", "json_schema", "none", "auto", "\x00", "~ids"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=12,
)
NEEDED = ("prompt", "messages", "input", "tokens")
BODIES = st.fixed_dictionaries(
    {"model": st.just("tiny") | VALUES, **{name: st.just("a") | VALUES for name in NEEDED}},
    optional={name: VALUES for name in FIELDS if name not in (*NEEDED, "model")},
)
SCHEMAS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("type", "properties", "enum", "required", "$ref", "pattern", "x-guidance"), VALUES)
)
FUNCTIONS = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g", "a.b"])},
    optional={"description": st.text(max_size=5), "parameters": SCHEMAS, "strict": st.booleans()},
)
TEXTS = st.text(max_size=8) | st.sampled_from(["<tool_call>", "</think>", '{"a": 1}', "[1]", "{{ 1 }}", "\ud800"])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXTS},
        optional={
            "tool_call_id": TEXTS,
            "reasoning_content": TEXTS,
            "tool_calls": st.lists(
                st.fixed_dictionaries(
                    {"id": TEXTS, "function": st.fixed_dictionaries({"name": st.just("f"), "arguments": TEXTS})}
                ),
                max_size=2,
            ),
        },
    ),
    min_size=1,
    max_size=4,
)
CHOICES = st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "f"}}])
TOOLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTIONS}), max_size=2)


def read(kind: type[Any], body: bytes) -> None:
    found: Any
    try:
        found = parsed(kind, body)
    except ApiError as error:
        found = error
    if isinstance(found, ApiError):
        assert found.status == 400
        assert "\n" not in str(found)
        assert len(str(found)) < 1000
        assert found.response().body
    else:
        assert isinstance(found, kind)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(body=BODIES)
def test_any_object_is_read_or_refused(kind: type[Any], body: dict[str, Any]) -> None:
    text = json.dumps({name: value for name, value in body.items() if name not in NEEDED or name in kind.model_fields})
    read(kind, text.encode())
    read(kind, text.encode()[: len(text) // 2])


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=200))
def test_any_bytes_are_refused(body: bytes) -> None:
    read(CompletionBody, body)


@pytest.fixture(scope="module", params=[None, QWEN_3, LLAMA_3])
def service(served_package: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    """A service with the package's own chat template, or with one that knows tools."""
    runtime = Runtime.load(served_package)
    ours = runtime.tokenizer
    if request.param is not None and ours is not None:
        template = request.param.replace("\\n", "\n")
        runtime.tokenizer = TextTokenizer(ours.backend_tokenizer, {"bos_token": "<end>"}, template)
    with Scheduler(runtime, 1) as scheduler:
        yield Service(runtime, scheduler, "tiny")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES, tools=TOOLS, choice=CHOICES, several=st.booleans(), schema=st.none() | SCHEMAS)
def test_any_chat_with_tools_is_prepared_or_refused(
    service: Service, messages: Any, tools: Any, choice: Any, several: bool, schema: Any
) -> None:
    body = {
        "model": "tiny",
        "messages": messages,
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": several,
    }
    if schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    found: Any
    try:
        found = service.job(parsed(ChatBody, json.dumps(body).encode()))
    except (ApiError, MeltError) as error:
        found = str(error)
    if isinstance(found, str):
        assert "\n" not in found
        assert len(found) < 2000
        return
    (request,) = found.requests
    if choice == "required":
        assert request.constraint is not None
    if request.constraint is not None:
        mask = request.constraint.mask([])
        assert mask is not None
        assert mask.any()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES)
def test_any_response_or_embedding_is_prepared_or_refused(service: Service, body: dict[str, Any]) -> None:
    ways: list[tuple[Any, Any]] = [
        (ResponsesBody, lambda call: service.job(call.chat())),
        (EmbeddingBody, lambda call: requests_of(service, call)),
    ]
    for kind, prepare in ways:
        given = {name: value for name, value in body.items() if name in kind.model_fields}
        with suppress(ApiError, MeltError, ValidationError):
            prepare(parsed(kind, json.dumps(given).encode()))
