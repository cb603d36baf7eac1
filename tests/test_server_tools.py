"""Calls of functions and reasoning in chats: what the template is given, what replies become, and what is enforced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from chat_styles import QWEN_3
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import Runtime
from openai import OpenAI
from scripted import scripted_server, with_template
from serving import WAIT, Server

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Ulm", "Rom"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA},
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
ASK: Any = [{"role": "user", "content": "How is it in Ulm?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}\n</tool_call>'
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}"
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "{% endfor %}{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
SIZE: dict[str, Any] = {"vocab_size": 104, "max_position_embeddings": 8192}
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(**SIZE, alphabet=ALPHABET)


@pytest.fixture(scope="module")
def qwen(checkpoint: Path, make_package: MakePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose chat template knows tools and reasoning."""
    made = with_template(checkpoint, tmp_path_factory.mktemp("qwen") / "model", QWEN_3.replace("\\n", "\n"))
    return make_package(made, max_batch=4)


@pytest.fixture(scope="module")
def mistral(checkpoint: Path, make_package: MakePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package in which [TOOL_CALLS] is a special token."""
    made = with_template(checkpoint, tmp_path_factory.mktemp("mistral") / "model", MISTRAL, pad="[TOOL_CALLS]")
    return make_package(made, max_batch=4)


@pytest.fixture(scope="module")
def free(qwen: Path) -> Iterator[Server]:
    """A server whose random model says what it likes."""
    with Server(qwen) as server:
        yield server


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": ASK, "tools": [WEATHER, CLOCK], "max_tokens": 400, **more}


def joined(stream: Any) -> tuple[dict[str, Any], str | None]:
    """Return the message and the finish reason of a stream, put together as OpenAI's documentation does."""
    message: dict[str, Any] = {"content": None}
    calls: dict[int, dict[str, Any]] = {}
    reason = None
    for part in stream:
        (choice,) = part.choices
        delta = choice.delta.model_dump(exclude_unset=True)
        for name in ("role", "content", "reasoning_content"):
            if delta.get(name) is not None:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls") or ():
            if call["index"] not in calls:
                assert call["id"]
                assert call["function"]["name"]
                calls[call["index"]] = {"name": call["function"]["name"], "arguments": ""}
            calls[call["index"]]["arguments"] += call["function"]["arguments"]
        reason = choice.finish_reason or reason
    message["calls"] = [calls[index] for index in sorted(calls)]
    return message, reason


def test_calls_text_and_reasoning_are_told_apart_whole_and_streamed(qwen: Path) -> None:
    second = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    reply = f"<think>\nUlm, two days.\n</think>\n\nI ask.\n{CALL}\n{second}"
    with scripted_server(qwen, [reply, reply, "Hello <tool>", "Hello <tool>"]) as server:
        client = server.client()
        made = client.chat.completions.create(**asked())
        choice = made.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert made.usage is not None
        assert made.usage.completion_tokens_details is not None
        assert made.usage.completion_tokens_details.reasoning_tokens == len("<think>\nUlm, two days.\n</think>")
        message = choice.message
        assert (message.content, message.model_extra) == ("I ask.", {"reasoning_content": "Ulm, two days."})
        assert message.tool_calls is not None
        found = [(one.type, one.function.name, one.function.arguments) for one in message.tool_calls]  # type: ignore[union-attr]
        assert found == [("function", "weather", '{"city": "Ulm", "days": 2}'), ("function", "clock", "{}")]
        assert len({one.id for one in message.tool_calls}) == 2
        parts, reason = joined(client.chat.completions.create(**asked(), stream=True))
        assert reason == "tool_calls"
        assert parts == {
            "role": "assistant",
            "content": "I ask.",
            "reasoning_content": "Ulm, two days.",
            "calls": [{"name": name, "arguments": arguments} for _, name, arguments in found],
        }
        plain = client.chat.completions.create(**asked()).choices[0]
        assert (plain.message.content, plain.message.tool_calls) == ("Hello <tool>", None)
        assert plain.finish_reason == "stop"
        parts, reason = joined(client.chat.completions.create(**asked(), stream=True))
        assert (parts["content"], parts["calls"], reason) == ("Hello <tool>", [], "stop")


def test_arguments_are_streamed_while_they_are_written(qwen: Path) -> None:
    with scripted_server(qwen, [CALL]) as server:
        stream = server.client().chat.completions.create(**asked(), stream=True)
        pieces = [call.function.arguments for part in stream for call in part.choices[0].delta.tool_calls or ()]
    assert "".join(pieces) == '{"city": "Ulm", "days": 2}'
    assert len(pieces) > 20


def test_an_allowed_call_is_held_to_its_schema_once_it_opens(qwen: Path) -> None:
    """The model wants a city that the schema does not have; the grammar forbids the token."""
    with scripted_server(qwen, [CALL.replace("Ulm", "Bonn")]) as server:
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=asked(), timeout=WAIT)
        assert reply.status_code == 500
        assert any("is forbidden" in line for line in server.lines) or "forbidden" in reply.text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_fits_whatever_the_model_wants(server: Server, choice: Any, stream: bool) -> None:
    client = server.client()
    for seed in range(4):
        body = asked(tool_choice=choice, seed=seed, temperature=1.5, parallel_tool_calls=False, stream=stream)
        if stream:
            message, reason = joined(client.chat.completions.create(**body))
            (call,) = message["calls"]
        else:
            made = client.chat.completions.create(**body).choices[0]
            assert made.message.tool_calls is not None
            (only,) = made.message.tool_calls
            call, reason = only.function.model_dump(), made.finish_reason  # type: ignore[union-attr]
        assert reason == "tool_calls"
        if call["name"] == "weather" or choice != "required":
            jsonschema.validate(json.loads(call["arguments"]), SCHEMA)
        else:
            assert json.loads(call["arguments"]) == {}


def test_no_call_is_found_where_none_may_be(qwen: Path) -> None:
    with scripted_server(qwen, [CALL]) as server:
        choice = server.client().chat.completions.create(**asked(tool_choice="none")).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (CALL, None)


def prompt(server: Server, **body: Any) -> str:
    """Return the text of a chat's prompt."""
    ids = httpx.post(f"{server.url}/tokenize", json=body, timeout=WAIT).json()["tokens"]
    return str(httpx.post(f"{server.url}/detokenize", json={"tokens": ids}, timeout=WAIT).json()["prompt"])


HISTORY: Any = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 2}'}}],
    },
    {"role": "tool", "tool_call_id": "a1", "content": "sunny"},
]


def test_the_template_is_given_tools_calls_and_results(free: Server) -> None:
    text = prompt(free, messages=HISTORY, tools=[WEATHER])
    assert '"name": "weather", "description": "The weather.", "parameters": {"type": "object"' in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"days": 2}}\n</tool_call>' in text
    assert "<tool_response>\nsunny\n</tool_response>" in text
    assert "<tools>" not in prompt(free, messages=HISTORY)


def test_the_template_is_given_the_effort_of_reasoning(
    checkpoint: Path, make_package: MakePackage, tmp_path_factory: pytest.TempPathFactory
) -> None:
    template = "{{ messages[0].content }}{{ reasoning_effort | default('') }}"
    package = make_package(with_template(checkpoint, tmp_path_factory.mktemp("effort") / "model", template))
    with Server(package) as server:
        create: Any = server.client().chat.completions.create
        ask: Any = {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 1}
        chats = [create(**ask, reasoning_effort=effort) for effort in (None, "none", "low", "medium")]
        assert [chat.usage.prompt_tokens for chat in chats] == [3, 3, 6, 9]
        given: Any = {"model": "tiny", "input": "abc", "max_output_tokens": 1}
        response = server.client().responses.create(**given, reasoning={"effort": "high"})
        assert response.usage is not None
        assert response.usage.input_tokens == 7
        assert response.reasoning is not None
        assert response.reasoning.effort == "high"
        preferred = create(**ask, reasoning_effort="low", extra_body={"chat_template_kwargs": {"reasoning_effort": ""}})
        assert preferred.usage.prompt_tokens == 3


def test_a_template_that_knows_no_tools_gets_them_explained(server: Server, served_runtime: Runtime) -> None:
    text = prompt(server, messages=HISTORY, tools=[WEATHER, CLOCK])
    first, second, third, fourth, _ = text.split("!")
    assert first.startswith("system: ")
    assert json.dumps(WEATHER) in first
    assert '"name": "clock", "description": "", "parameters": {"type": "object"' in first
    assert second == "user: How is it in Ulm?"
    assert third == 'assistant: <tool_call>\n{"name": "weather", "arguments": {"days": 2}}\n</tool_call>'
    assert fourth == "user: <tool_response>\nsunny\n</tool_response>"


def test_a_model_without_tools_of_its_own_can_call_them(served_package: Path) -> None:
    with scripted_server(served_package, [CALL]) as server:
        message = server.client().chat.completions.create(**asked()).choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == '{"city": "Ulm", "days": 2}'  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
def test_a_special_token_may_open_calls(mistral: Path, stream: bool) -> None:
    reply = '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rom", "days": 1}}]'
    with scripted_server(mistral, [reply]) as server:
        client = server.client()
        if stream:
            message, reason = joined(client.chat.completions.create(**asked(), stream=True))
            (call,) = message["calls"]
        else:
            choice = client.chat.completions.create(**asked()).choices[0]
            assert choice.message.tool_calls is not None
            call, reason = choice.message.tool_calls[0].function.model_dump(), choice.finish_reason  # type: ignore
            back: Any = [*ASK, choice.message.model_dump(), {"role": "tool", "tool_call_id": "x", "content": "wet"}]
            assert client.chat.completions.create(**asked(messages=back, max_tokens=2)).choices  # ids of 9 characters
        required = client.chat.completions.create(**asked(tool_choice="required", seed=1)).choices[0].message
    assert (call, reason) == ({"name": "weather", "arguments": '{"city": "Rom", "days": 1}'}, "tool_calls")
    assert required.tool_calls


def test_json_is_asked_for_beside_tools(qwen: Path) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    with scripted_server(qwen, ["42", CALL]) as server:
        client = server.client()
        first, second = (client.chat.completions.create(**asked(response_format=form)).choices[0] for _ in range(2))
    assert (first.message.content, first.message.tool_calls) == ("42", None)
    assert (second.message.content, second.finish_reason) == (None, "tool_calls")


def test_a_reply_that_is_cut_in_a_call_says_so(qwen: Path) -> None:
    with scripted_server(qwen, [CALL]) as server:
        choice = server.client().chat.completions.create(**asked(max_tokens=60)).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.arguments.startswith('{"ci')  # type: ignore[union-attr]


def function_of(parameters: dict[str, Any]) -> Any:
    return [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "all"}, "tool_choice"),
        ({"tools": [CLOCK] * 513}, "tools"),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}, "messages.0.tool_call_id"),
        ({"messages": [{**HISTORY[1], "role": "user", "content": "a"}]}, "messages.0.tool_calls"),
        ({"tools": function_of({"type": "string"})}, "tools.0.function.parameters.type"),
        ({"tools": function_of({"type": ["object", "null"]})}, "tools.0.function.parameters.type"),
        ({"tools": function_of({"properties": {"a": {"type": "nonsense"}}}), "tool_choice": "required"}, None),
        ({"tools": function_of({"enum": list(range(60_000))}), "tool_choice": "required"}, None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_tools_that_make_no_sense_are_refused(free: Server, change: dict[str, Any], param: str | None) -> None:
    reply = httpx.post(f"{free.url}/v1/chat/completions", json=asked(**change), timeout=WAIT)
    assert reply.status_code == 400, reply.text
    assert param is None or reply.json()["error"]["param"] == param


def test_a_schema_that_no_grammar_can_hold_is_no_hindrance_where_a_call_is_only_allowed(qwen: Path) -> None:
    odd = function_of({"type": "object", "multipleOf": 988_027})
    with scripted_server(qwen, [CALL]) as server:
        choice = server.client().chat.completions.create(**asked(tools=odd)).choices[0]
    assert choice.finish_reason == "tool_calls"


def test_arguments_that_are_no_json_come_back_as_they_were(free: Server) -> None:
    broken = json.loads(json.dumps(HISTORY))
    broken[1]["tool_calls"][0]["function"]["arguments"] = '{"days": '
    assert '"arguments": {"days": }' in prompt(free, messages=broken)


def test_openais_client_parses_the_arguments(server: Server) -> None:
    from pydantic import BaseModel

    class Days(BaseModel):
        count: int

    import openai

    client: OpenAI = server.client()
    made = client.chat.completions.parse(
        model="tiny",
        messages=ASK,
        tools=[openai.pydantic_function_tool(Days, name="days")],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
        seed=2,
    )
    calls = made.choices[0].message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, Days)
