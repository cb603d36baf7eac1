"""Requests that Open WebUI 0.12.4 was recorded sending: its page's chats with its own functions, and its tasks.

``test_server_clients.py`` runs Open WebUI itself where it is installed.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from conftest import MakeCheckpoint, MakePackage
from serving import WAIT, Server

USER: Any = {"role": "user", "content": "Hello"}
# Three of its 28 functions: Python's defaults, no "required", lists of objects without properties.
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "What it does.", "parameters": parameters}}
    for name, parameters in (
        ("get_current_timestamp", {"properties": {}, "type": "object"}),
        (
            "calculate_timestamp",
            {
                "properties": {"days_ago": {"default": 0, "description": "Days.", "type": "integer"}},
                "type": "object",
            },
        ),
        (
            "ask_user",
            {
                "properties": {
                    "questions": {"items": {"additionalProperties": True, "type": "object"}, "type": "array"},
                    "allow_other": {"default": True, "description": "Free answers.", "type": "boolean"},
                },
                "required": ["questions"],
                "type": "object",
            },
        ),
    )
]
CALLED: Any = [
    USER,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_cf13fe08fc0647dab0e188f3",
                "type": "function",
                "function": {"name": "calculate_timestamp", "arguments": '{"days_ago":3}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_cf13fe08fc0647dab0e188f3", "content": '{"current_timestamp":1795708212}'},
]
SET_ON_THE_PAGE: Any = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "seed": 42,
    "stop": ["###"],
    "max_tokens": 128,
    "frequency_penalty": 1.1,
    "presence_penalty": 0.5,
    "reasoning_effort": "medium",
    "logit_bias": {"5": -100, "6": 2},
    "loops": 3,  # its "custom parameters"
    "exit_threshold": 0.9,
    "stream_options": {"include_usage": True},
}


def post(server: Server, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=WAIT)


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": False, "messages": [USER], "max_tokens": 4},
        {"stream": True, "messages": [USER], "tools": TOOLS},
        {"stream": True, "messages": CALLED, "tools": TOOLS},
        {"stream": True, "messages": [{"role": "system", "content": "Be brief."}, USER], **SET_ON_THE_PAGE},
    ],
    ids=["chat", "tools", "called", "set"],
)
def test_the_pages_chats_are_answered(server: Server, fields: dict[str, Any]) -> None:
    reply = post(server, **fields)
    assert reply.status_code == 200, reply.text
    assert '"error"' not in reply.text


def test_the_tokens_are_counted_at_the_end_of_a_stream(server: Server) -> None:
    reply = post(server, stream=True, messages=[USER], max_tokens=4, stream_options={"include_usage": True})
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    assert events[-1]["usage"]["completion_tokens"] in range(1, 5)
    assert not events[-1]["choices"]


def test_a_task_that_asks_for_more_tokens_than_the_cache_holds_gets_what_it_holds(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    package = make_package(make_checkpoint(tokenizer=True), max_seq_len=32)
    with Server(package) as server:
        usual: Any = {"messages": [USER], "stream": False, "ignore_eos": True}
        whole = post(server, **usual).json()
        asked = post(server, **usual, max_tokens=1000)
        assert asked.status_code == 200, asked.text
        assert asked.json()["choices"][0]["finish_reason"] == "length"
        assert asked.json()["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
