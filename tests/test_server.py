"""The server as OpenAI's own client sees it: every parameter, streamed and not, and what only a looped model has."""

from __future__ import annotations

import json
from typing import Any

import httpx
import psutil
import pytest
from melt_runtime import Runtime
from openai import NotFoundError, OpenAI
from serving import WAIT, Server, eventually

HELLO: Any = [{"role": "user", "content": "Hello"}]
GREEDY: Any = {"model": "tiny", "temperature": 0, "max_tokens": 12}
GO_ON: Any = {"ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {"right": {"type": "boolean"}, "digit": {"enum": [1, 2, 3]}},
    "required": ["right", "digit"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


def test_the_models_are_listed_and_found_by_name(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").model_extra["loops"] == 4  # type: ignore[index]
    with pytest.raises(NotFoundError):
        client.models.retrieve("other")


def test_a_completion_is_what_the_runtime_gives(client: OpenAI, served_runtime: Runtime) -> None:
    reply = client.completions.create(prompt="abc", **GREEDY, extra_body=GO_ON)
    expected = served_runtime.generate("abc", max_tokens=12, ignore_eos=True)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (expected.text, "length")
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 12, 15)


def test_a_prompt_may_be_token_ids_and_there_may_be_several(client: OpenAI, served_runtime: Runtime) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    reply = client.completions.create(prompt=prompts, **GREEDY, extra_body=GO_ON)
    expected = served_runtime.generate(prompts, max_tokens=12, ignore_eos=True)
    assert [choice.model_extra["token_ids"] for choice in reply.choices] == [list(one.token_ids) for one in expected]  # type: ignore[index]
    assert client.completions.create(prompt=prompts[0], **GREEDY, extra_body=GO_ON).choices[0].text == expected[0].text


def test_more_loops_than_the_model_was_trained_for_are_told_in_the_reply(client: OpenAI) -> None:
    asked: Any = {"prompt": "abc", **GREEDY, "extra_body": {**GO_ON, "loops": 9}}
    (told,) = client.completions.create(**asked).choices[0].model_extra["warnings"]  # type: ignore[index]
    assert told.startswith("loops is 9, but the model was trained for 4 loops per token")
    *before, last = (chunk.choices[0].model_extra or {} for chunk in client.completions.create(**asked, stream=True))
    assert last["warnings"] == [told]
    assert not any("warnings" in one for one in before)
    usual = client.completions.create(prompt="abc", **GREEDY, extra_body=GO_ON)
    assert "warnings" not in (usual.choices[0].model_extra or {})


def test_a_chat_is_what_the_runtime_gives(client: OpenAI, served_runtime: Runtime) -> None:
    reply = client.chat.completions.create(messages=HELLO, **GREEDY, extra_body=GO_ON)
    expected = served_runtime.generate(served_runtime.chat_prompt(HELLO), max_tokens=12, ignore_eos=True)
    assert (reply.choices[0].message.role, reply.choices[0].message.content) == ("assistant", expected.text)


def test_content_in_parts_and_a_developers_message_are_understood(client: OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    found = [
        client.chat.completions.create(messages=messages, **GREEDY, extra_body=GO_ON).choices[0].message.content
        for messages in (
            [{"role": "system", "content": "Be"}, *HELLO],
            [{"role": "developer", "content": "Be"}, {"role": "user", "content": parts}],
        )
    ]
    assert found[0] == found[1]


def test_max_completion_tokens_is_max_tokens(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=5, temperature=0, extra_body=GO_ON
    )
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 5


@pytest.mark.parametrize("stop", ["one", "several"])
def test_a_text_ends_before_its_stop_string(client: OpenAI, served_runtime: Runtime, stop: str) -> None:
    text = served_runtime.generate("abc", max_tokens=12, ignore_eos=True).text
    ending = text[6:8]
    reply = client.completions.create(
        prompt="abc", **GREEDY, stop=ending if stop == "one" else ["\x00", ending], extra_body=GO_ON
    )
    assert reply.choices[0].text == text[: text.index(ending)]
    assert reply.choices[0].finish_reason == "stop"


def test_a_stop_string_may_name_a_special_token(client: OpenAI, served_runtime: Runtime) -> None:
    asked: Any = {"temperature": 2.0, "seed": 4, "max_tokens": 400}
    expected = served_runtime.generate("abc", **asked, ignore_eos=True, stop=["~~~~", "<pad>"])
    assert expected.finish_reason == "stop"
    assert expected.token_ids[-1] == 0
    reply = client.completions.create(
        model="tiny", prompt="abc", **asked, stop=["~~~~", "<pad>"], extra_body=GO_ON
    ).choices[0]
    assert (reply.text, reply.finish_reason) == (expected.text, "stop")
    assert reply.model_extra is not None
    assert reply.model_extra["token_ids"] == list(expected.token_ids)


def test_a_seed_gives_the_same_choices_again_and_each_choice_its_own(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "abc", "n": 3, "seed": 7, "temperature": 1.5, "top_p": 0.9}
    first, second = (
        [choice.text for choice in client.completions.create(**asked, extra_body=GO_ON).choices] for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 3


def test_the_smallest_top_p_is_greedy(client: OpenAI, served_runtime: Runtime) -> None:
    reply = client.completions.create(
        model="tiny", prompt="abc", top_p=1e-9, temperature=1.0, max_tokens=12, extra_body=GO_ON
    )
    assert reply.choices[0].text == served_runtime.generate("abc", max_tokens=12, ignore_eos=True).text


def test_values_that_only_other_servers_have_mean_the_same_here(client: OpenAI) -> None:
    def texts(**asked: Any) -> list[str]:
        reply = client.completions.create(
            model="tiny", prompt="abc", max_tokens=12, n=2, extra_body=GO_ON | asked.pop("more", {}), **asked
        )
        return [choice.text for choice in reply.choices]

    assert texts(top_p=0) == texts(temperature=0)
    assert texts(seed=5, more={"top_k": -1}) == texts(seed=5)
    assert texts(seed=-2) == texts(seed=-2)
    assert len({*texts(seed=-2), *texts(seed=2), *texts(seed=-4)}) == 6
    assert len({*texts(seed=-1), *texts(seed=-1)}) == 4


def test_logprobs_of_a_chat_name_the_token_and_the_likeliest(client: OpenAI) -> None:
    reply = client.chat.completions.create(messages=HELLO, **GREEDY, logprobs=True, top_logprobs=3, extra_body=GO_ON)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 12
    for entry in logprobs.content:
        assert [one.logprob for one in entry.top_logprobs] == sorted(
            (one.logprob for one in entry.top_logprobs), reverse=True
        )
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert entry.bytes == list(entry.token.encode())


def test_logprobs_of_a_completion_say_where_each_token_begins(client: OpenAI) -> None:
    choice = client.completions.create(prompt="abc", **GREEDY, logprobs=2, extra_body=GO_ON).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset is not None
    assert len(choice.logprobs.tokens or ()) == len(choice.logprobs.token_logprobs or ()) == 12
    assert choice.logprobs.text_offset[0] == 0
    assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs or ())


@pytest.mark.parametrize("loops", [1, 3, 4])
def test_every_token_takes_the_loops_asked_for(client: OpenAI, loops: int) -> None:
    reply = client.completions.create(prompt="abc", **GREEDY, extra_body={**GO_ON, "loops": loops})
    assert reply.choices[0].model_extra["depth"] == [loops] * 12  # type: ignore[index]


def test_tokens_leave_at_the_threshold_and_not_before_the_least_loops(client: OpenAI, served_runtime: Runtime) -> None:
    for least in (1, 3):
        asked = {**GO_ON, "exit_threshold": 0.6, "min_loops": least}
        depth = client.completions.create(prompt="abc", **GREEDY, extra_body=asked).choices[0].model_extra["depth"]  # type: ignore[index]
        expected = served_runtime.generate(
            "abc", max_tokens=12, ignore_eos=True, exit_threshold=0.6, min_loops=least
        ).depth
        assert depth == list(expected[2:])
        assert min(depth) >= least


# Streams


def test_a_streamed_chat_joins_to_the_whole_and_has_the_depth_of_each_token(client: OpenAI) -> None:
    whole = client.chat.completions.create(messages=HELLO, **GREEDY, extra_body=GO_ON).choices[0]
    parts = [
        part.choices[0]
        for part in client.chat.completions.create(messages=HELLO, **GREEDY, stream=True, extra_body=GO_ON)
    ]
    assert "".join(part.delta.content or "" for part in parts) == whole.message.content
    assert [part.delta.role for part in parts] == ["assistant"] + [None] * 11
    assert [part.finish_reason for part in parts] == [None] * 11 + ["length"]
    assert [depth for part in parts for depth in part.model_extra["depth"]] == whole.model_extra["depth"]  # type: ignore[index]


def test_a_stream_of_several_choices_tells_them_apart(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": ["abc", "xyz"], "n": 2, "seed": 3, "max_tokens": 9, "logprobs": 1}
    whole = client.completions.create(**asked, extra_body=GO_ON)
    texts = [""] * 4
    offsets: list[list[int]] = [[] for _ in range(4)]
    for part in client.completions.create(**asked, stream=True, extra_body=GO_ON):
        choice = part.choices[0]
        texts[choice.index] += choice.text
        offsets[choice.index] += choice.logprobs.text_offset or [] if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices if choice.logprobs]


def test_a_stream_ends_with_the_counts_if_they_are_asked_for(client: OpenAI) -> None:
    *parts, last = client.completions.create(
        prompt="abc", **GREEDY, stream=True, stream_options={"include_usage": True}, extra_body=GO_ON
    )
    assert all(part.usage is None for part in parts)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 12)


def test_a_stream_is_server_sent_events_that_end_with_done(server: Server) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", json={**GREEDY, "prompt": "abc", "stream": True}, timeout=WAIT)
    events = reply.text.split("\n\n")
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["id"].startswith("cmpl-") for event in events[:-2])


# JSON


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_json_keeps_to_its_schema(client: OpenAI, temperature: float) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    reply = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format=wanted, temperature=temperature, seed=1, max_tokens=400
    )
    answer = json.loads(reply.choices[0].message.content or "")
    assert set(answer) == {"right", "digit"}
    assert answer["digit"] in (1, 2, 3)
    assert reply.choices[0].finish_reason == "stop"


def test_the_schema_true_allows_any_json(client: OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "any", "schema": True}}
    reply = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format=wanted, temperature=2.0, seed=5, max_tokens=400, n=4
    )
    ended = [choice.message.content or "" for choice in reply.choices if choice.finish_reason == "stop"]
    assert ended
    for content in ended:
        json.loads(content)


def test_a_json_object_begins_as_one(client: OpenAI) -> None:
    reply = client.chat.completions.create(messages=HELLO, **GREEDY, response_format={"type": "json_object"})
    assert (reply.choices[0].message.content or "").lstrip().startswith("{")


def test_schemas_that_ask_for_much_leave_no_memory_behind(server: Server) -> None:
    def ask(schema: Any, count: int) -> int:
        wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
        body = {"model": "tiny", "prompt": "abc", "n": count, "max_tokens": 4, "response_format": wanted}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=WAIT).status_code

    process = psutil.Process(server.process.pid)
    assert ask(SCHEMA, 1) == 200
    before = process.memory_info().rss
    for _ in range(3):
        assert ask({"type": "integer", "multipleOf": 988_027}, 20) == 400
        assert ask({"enum": [f"value {number}" for number in range(60_000)]}, 20) == 400
        assert ask({"type": "integer", "multipleOf": 65_521}, 20) == 200
        assert ask({"enum": [f"value {number}" for number in range(40_000)]}, 20) == 200
    assert process.memory_info().rss - before < 250 << 20
    assert ask(SCHEMA, 1) == 200


# Looking in


def test_state_does_not_move_with_the_loops_and_the_metrics_count(server: Server, served_runtime: Runtime) -> None:
    before = server.metrics()
    for loops in (1, 4):
        server.client().completions.create(prompt="abc", **GREEDY, extra_body={**GO_ON, "loops": loops})
    after = server.metrics()
    assert after["melt_state_bytes"] == before["melt_state_bytes"] == served_runtime.state_bytes(4)
    for name, more in {
        "melt_generated_tokens_total": 24,
        "melt_prompt_tokens_total": 6,
        'melt_requests_total{outcome="length"}': 2,
        "melt_first_token_seconds_count": 2,
        "melt_inter_token_seconds_count": 22,
        'melt_depth_loops_bucket{le="1"}': 12,
        'melt_depth_loops_bucket{le="+Inf"}': 24,
        "melt_depth_loops_sum": 60,
    }.items():
        assert after[name] - before.get(name, 0) == more, name


def test_the_page_is_one_file_that_asks_nobody_else(server: Server) -> None:
    reply = httpx.get(server.url, timeout=WAIT)
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "://" not in reply.text
    assert 'type="range"' in reply.text


def test_the_log_is_json_and_holds_no_prompt(server: Server) -> None:
    server.client().completions.create(prompt="quite a secret", **GREEDY)
    eventually(lambda: any(line.get("prompt_tokens") == 14 and line["status"] == 200 for line in server.log()))
    assert len(server.log()) == len(server.lines)
    assert not any("secret" in line for line in server.lines)
