"""OpenAI's responses, as its own client sends and reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_styles import QWEN_3
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import Runtime
from openai import OpenAI
from pydantic import BaseModel
from scripted import scripted_server, with_template
from serving import WAIT, Server

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
REPLY = f"<think>\nUlm it is.\n</think>\n\nI ask.\n{CALL}\n{CALL}"


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def qwen(make_checkpoint: MakeCheckpoint, make_package: MakePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose chat template knows tools and reasoning."""
    checkpoint = make_checkpoint(vocab_size=104, max_position_embeddings=8192, alphabet=ALPHABET)
    made = with_template(checkpoint, tmp_path_factory.mktemp("qwen") / "model", QWEN_3.replace("\\n", "\n"))
    return make_package(made, max_batch=4)


def test_a_response_is_the_chats_answer(client: OpenAI, served_runtime: Runtime) -> None:
    made = client.responses.create(
        model="tiny",
        input="Hello",
        instructions="Be",
        temperature=0,
        max_output_tokens=12,
        extra_body={"ignore_eos": True},
    )
    messages = [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hello"}]
    expected = served_runtime.generate(served_runtime.chat_prompt(messages), max_tokens=12, ignore_eos=True)
    assert made.output_text == expected.text
    assert (made.status, made.store) == ("incomplete", False)  # type: ignore[attr-defined]
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens) == (expected.prompt_tokens, 12)
    assert made.model_extra is not None
    assert made.model_extra["depth"] == [4] * 12
    assert made.model_extra["token_ids"] == list(expected.token_ids)


def test_a_stream_has_the_same_items_as_the_whole(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "input": "Hello", "temperature": 0, "max_output_tokens": 20}
    asked["extra_body"] = {"ignore_eos": True}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 20


def test_reasoning_text_and_calls_are_items_and_can_be_sent_back(qwen: Path) -> None:
    with scripted_server(qwen, [REPLY, REPLY, "It is sunny."]) as server:
        client = server.client()
        asked: Any = {"model": "tiny", "tools": [WEATHER], "max_output_tokens": 400}
        ask: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Weather in Ulm?"}]}]
        made = client.responses.create(**asked, input=ask)
        assert made.status == "completed"
        kinds = [item.type for item in made.output]
        assert kinds == ["reasoning", "message", "function_call", "function_call"]
        assert made.output[0].content[0].text == "Ulm it is."  # type: ignore[union-attr, index]
        assert made.output_text == "I ask."
        assert made.usage is not None
        assert made.usage.output_tokens_details.reasoning_tokens == len("<think>\nUlm it is.\n</think>")
        assert made.output[2].arguments == '{"city": "Ulm"}'  # type: ignore[union-attr]
        with client.responses.stream(**asked, input=ask) as stream:
            seen = [event.type for event in stream]
            last = stream.get_final_response()
        assert [item.type for item in last.output] == kinds
        assert last.output[3].arguments == '{"city": "Ulm"}'  # type: ignore[union-attr]
        assert seen.count("response.function_call_arguments.done") == 2
        assert seen.count("response.output_item.done") == 4
        assert "response.reasoning_text.delta" in seen
        assert seen[-1] == "response.completed"
        results = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
            for item in made.output
            if item.type == "function_call"
        ]
        after = client.responses.create(**asked, input=[*ask, *made.output, *results])
        assert after.output_text == "It is sunny."


def test_a_response_may_be_json_by_a_schema(client: OpenAI) -> None:
    class Answer(BaseModel):
        right: bool

    made = client.responses.parse(model="tiny", input="Yes?", text_format=Answer, max_output_tokens=100)
    assert isinstance(made.output_parsed, Answer)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_call_may_be_required(client: OpenAI, choice: Any) -> None:
    flag = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    made = client.responses.create(
        model="tiny",
        input="Hello",
        tools=[{**WEATHER, "parameters": flag}],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_output_tokens=300,
    )
    (item,) = made.output
    assert item.type == "function_call"
    assert set(json.loads(item.arguments)) == {"on"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv"}, "conversation"),
        ({"background": True}, "background"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input.0.call_id"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "thorough"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, None),
        ({"loops": 17}, "loops"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_a_response_cannot_honour_is_refused(server: Server, change: dict[str, Any], param: str | None) -> None:
    body = {"model": "tiny", "input": "Hello", "max_output_tokens": 2, **change}
    reply = httpx.post(f"{server.url}/v1/responses", json=body, timeout=WAIT)
    assert reply.status_code == 400, reply.text
    assert param is None or reply.json()["error"]["param"].startswith(param)


def test_fields_that_ask_for_nothing_are_accepted(client: OpenAI) -> None:
    made = client.responses.create(
        model="tiny",
        input=[{"role": "user", "content": "Hello"}],
        max_output_tokens=2,
        store=True,
        include=["reasoning.encrypted_content"],
        truncation="disabled",
        reasoning={"effort": "none"},
        text={"format": {"type": "text"}},
        metadata={"a": "b"},
        user="me",
        tools=[],
    )
    assert made.metadata == {"a": "b"}


def test_an_error_ends_the_stream_as_an_event(served_package: Path) -> None:
    with Server(served_package, "--max-seconds", 0.4) as server:

        def events() -> Iterator[str]:
            body = {"model": "tiny", "input": "Hello", "stream": True, "ignore_eos": True, "max_output_tokens": 4000}
            with httpx.stream("POST", f"{server.url}/v1/responses", json=body, timeout=WAIT) as reply:
                yield from (line.removeprefix("event: ") for line in reply.iter_lines() if line.startswith("event: "))

        assert list(events())[-1] in ("response.incomplete", "error")
