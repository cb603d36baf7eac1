"""What a server keeps within bounds: time, memory of what nobody reads, and the prompts that it need not run again."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from melt_runtime import BusyError, MeltError, Package, Request, Runtime, Scheduler
from melt_runtime.cli import serve as serve
from melt_runtime.cli.main import app
from melt_runtime.server.streaming import Backlog, Event, Feed
from openai import APIStatusError, BadRequestError, OpenAI
from serving import Server, eventually
from test_server_life import LONG, cancelled, idle, send
from typer.testing import CliRunner

GREEDY: Any = {"model": "tiny", "temperature": 0, "max_tokens": 12}
GO_ON: Any = {"ignore_eos": True}
SYSTEM = "You are a loop that thinks as long as it needs to. "
# Several megabytes that nobody reads: more than the system holds on the way.
UNREAD = {**LONG, "stream": True, "max_tokens": 3500, "logprobs": True, "top_logprobs": 20}
UNREAD["messages"] = [{"role": "user", "content": UNREAD.pop("prompt")}]


# After several hundred tokens the backend is so slow that no long answer is over before the test gives up.
SLOWS_DOWN = """
import time
from melt_runtime.backends.onnxruntime_cpu import OnnxRuntimeState
run, count = OnnxRuntimeState.run, 0
def slows_down(*arguments):
    global count
    count += 1
    time.sleep(0.01 if count > 4000 else 0)
    run(*arguments)
OnnxRuntimeState.run = slows_down
"""


def chat(text: str) -> Any:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def refused(package: Path, *options: object) -> str:
    """The one line of a command that does not start."""
    result = CliRunner().invoke(app, ["serve", str(package), *map(str, options)])
    assert result.exit_code == 2, result.output
    return result.stderr


# Prompts that begin alike


def test_a_prompt_that_begins_as_one_before_is_partly_put_back_and_answered_the_same(
    served_package: Path, served_runtime: Runtime
) -> None:
    texts = ["one", "another", "one"]
    with Server(served_package, "--slots", 2) as server, Server(served_package, "--prefix-bytes", 0) as other:
        found = {}
        for where in (server, other):
            client, before = where.client(), where.metrics()
            replies = [
                client.chat.completions.create(messages=chat(text), **GREEDY, extra_body=GO_ON) for text in texts
            ]
            found[where] = [reply.choices[0].message.content for reply in replies]
            cached = [cached_tokens(reply) for reply in replies]
            after = where.metrics()
            assert after["melt_prefix_tokens_total"] - before["melt_prefix_tokens_total"] == sum(cached)
            assert after["melt_prefix_hits_total"] == sum(count > 0 for count in cached)
            ran = after["melt_prompt_tokens_total"] - before["melt_prompt_tokens_total"]
            assert ran == sum(reply.usage.prompt_tokens for reply in replies if reply.usage) - sum(cached)
            if where is server:
                assert cached[0] == 0
                assert cached[1] == len("system: " + SYSTEM + "!user: ") // 8 * 8
                assert cached[2] >= cached[1]
                assert 0 < after["melt_prefix_bytes"] <= 64 << 20
            else:
                assert cached == [0, 0, 0]
                assert after["melt_prefix_bytes"] == 0
        expected = [
            served_runtime.generate(served_runtime.chat_prompt(chat(text)), max_tokens=12, ignore_eos=True).text
            for text in texts
        ]
        assert found[server] == found[other] == expected


def cached_tokens(reply: Any) -> int:
    return int(reply.usage.prompt_tokens_details.cached_tokens)


def test_a_stream_says_what_was_put_back_and_choices_of_one_prompt_count_as_the_first(served_package: Path) -> None:
    with Server(served_package, "--slots", 1) as server:
        asked: Any = {"messages": chat("hello"), **GREEDY, "extra_body": GO_ON}
        assert cached_tokens(server.client().chat.completions.create(**asked, n=2)) == 0
        *_, last = server.client().chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        assert cached_tokens(last) > 40


def test_rows_beyond_the_bytes_that_were_allowed_are_not_kept(served_package: Path, served_runtime: Runtime) -> None:
    room = served_runtime.manifest.cache_bytes(16)
    with Server(served_package, "--prefix-bytes", room) as server:
        for text in ("hello", "hello", "again"):
            server.client().chat.completions.create(messages=chat(text), **GREEDY)
        assert server.metrics()["melt_prefix_bytes"] == room


def test_more_bytes_for_prompts_than_there_are_is_refused(served_package: Path) -> None:
    assert "bytes of memory are available besides the state" in refused(
        served_package, "--port", 0, "--prefix-bytes", 1 << 60
    )


def test_where_nothing_is_said_the_store_takes_no_more_than_a_quarter_of_what_is_left(
    served_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = served_runtime.memory(batch=2).session_bytes
    for left, expected in ((4000, 1000), (1 << 40, 64 << 20)):
        monkeypatch.setattr(serve, "available_memory", lambda left=left: state + left)
        store = serve._prefix_store(served_runtime, 2, None)
        assert store is not None
        assert store.max_bytes == expected
    monkeypatch.setattr(serve, "available_memory", lambda: state - 1)
    assert serve._prefix_store(served_runtime, 2, None) is None


# Time


@pytest.fixture(scope="module")
def hurried(served_package: Path) -> Iterator[Server]:
    """A server with one slot, where nothing takes longer than a second."""
    with Server(served_package, "--slots", 1, "--max-seconds", 1.5) as server:
        yield server


def test_a_request_whose_time_is_over_keeps_what_there_is(hurried: Server, served_runtime: Runtime) -> None:
    asked = {**LONG, "extra_body": {**GO_ON, "max_seconds": 0.4, "loops": 4}}
    del asked["ignore_eos"]
    choice = hurried.client().completions.create(**asked).choices[0]
    assert choice.finish_reason == "length"
    assert choice.model_extra is not None
    assert choice.model_extra["deadline"] is True
    count = len(choice.model_extra["token_ids"])
    assert 0 < count < 4000
    assert choice.text == served_runtime.generate("abc", max_tokens=count, ignore_eos=True).text
    assert idle(hurried)


def test_the_servers_own_limit_ends_a_stream_with_its_end_marked(hurried: Server) -> None:
    asked = {**LONG, "extra_body": GO_ON, "stream": True}
    del asked["ignore_eos"]
    *parts, last = (part.choices[0] for part in hurried.client().completions.create(**asked))
    assert 0 < len(parts) < 4000
    assert {part.finish_reason for part in parts} == {None}
    assert last.finish_reason == "length"
    assert last.model_extra is not None
    assert last.model_extra["deadline"] is True
    assert last.model_extra["token_ids"] == []
    eventually(lambda: any(line.get("deadline") for line in hurried.log()))


def test_time_that_passes_in_the_queue_is_an_error_with_its_own_code(hurried: Server) -> None:
    client = hurried.client()
    asked = {**LONG, "extra_body": GO_ON, "stream": True}
    del asked["ignore_eos"]
    with client.completions.create(**asked) as stream:
        next(iter(stream))
        with pytest.raises(APIStatusError) as caught:
            client.completions.create(model="tiny", prompt="abc", max_tokens=2, extra_body={"max_seconds": 0.05})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline")


@pytest.mark.parametrize("seconds", [0, -1, 2.0, "1"])
def test_a_time_that_makes_no_sense_or_is_not_allowed_is_refused(hurried: Server, seconds: Any) -> None:
    with pytest.raises(BadRequestError, match="max_seconds"):
        hurried.client().completions.create(model="tiny", prompt="abc", extra_body={"max_seconds": seconds})


@pytest.mark.parametrize("seconds", [0, -2, "nan", "inf"])
def test_a_limit_that_makes_no_sense_is_refused(served_package: Path, seconds: object) -> None:
    assert "--max-seconds is" in refused(served_package, "--max-seconds", seconds)


# Compute


def test_the_compute_that_was_saved_is_told_at_the_end_of_every_choice(
    hurried: Server, served_runtime: Runtime
) -> None:
    client = hurried.client()
    for loops, threshold in ((4, 1.0), (4, 0.6), (2, 0.5)):
        asked: Any = {"prompt": "abc", **GREEDY, "extra_body": {**GO_ON, "loops": loops, "exit_threshold": threshold}}
        expected = served_runtime.generate(
            "abc", max_tokens=12, ignore_eos=True, loops=loops, exit_threshold=threshold
        ).saved
        assert (expected > 0) == (threshold < 1)
        assert client.completions.create(**asked).choices[0].model_extra["saved"] == expected  # type: ignore[index]
        parts = [part.choices[0].model_extra or {} for part in client.completions.create(**asked, stream=True)]
        assert [part.get("saved") for part in parts] == [None] * 11 + [expected]


def test_tokens_leave_once_they_settle(hurried: Server, served_runtime: Runtime) -> None:
    asked = {**GO_ON, "exit_change": 0.5, "loops": 6}
    depth = (
        hurried.client().completions.create(prompt="abc", **GREEDY, extra_body=asked).choices[0].model_extra["depth"]
    )  # type: ignore[index]
    expected = served_runtime.generate("abc", max_tokens=12, ignore_eos=True, exit_change=0.5, loops=6).depth
    assert depth == list(expected[2:])
    assert min(depth) < 6


def test_the_criteria_by_which_tokens_leave_are_one_field(hurried: Server, served_runtime: Runtime) -> None:
    asked = {**GO_ON, "exit": "entropy:3.7,same:2", "loops": 6}
    reply = hurried.client().completions.create(prompt="abc", **GREEDY, extra_body=asked)
    expected = served_runtime.generate("abc", max_tokens=12, ignore_eos=True, exit="entropy:3.7,same:2", loops=6).depth
    assert reply.choices[0].model_extra["depth"] == list(expected[2:])  # type: ignore[index]
    for wrong, says in (("mood:1", "NAME:VALUE"), ("auto", "without a calibrated exit")):
        with pytest.raises(BadRequestError, match=says):
            hurried.client().completions.create(prompt="abc", **GREEDY, extra_body={**GO_ON, "exit": wrong})


def test_auto_runs_as_many_loops_at_most_as_it_was_calibrated_with(served_package: Path, tmp_path: Path) -> None:
    copy = Path(copytree(served_package, tmp_path / "package"))
    manifest = Package.open(copy).manifest
    found = {"criteria": "never", "quality": "1pt", "text": "a text", "tokens": 9, "loss": 0.5, "loops": 2.0}
    (copy / "manifest.json").write_text(manifest.with_exit({**found, "full_loops": 4, "most_loops": 2}).to_json())
    with Server(copy, "--slots", 2, "--max-loops", 3) as server:
        client = server.client()
        (model,) = client.models.list().data
        assert (model.model_extra["exit"], model.model_extra["exit_loops"]) == ("never", 2)  # type: ignore[index]
        for asked, loops in (({"exit": "auto"}, 2), ({"exit": "auto", "loops": 3}, 3), ({}, 3)):
            reply = client.completions.create(
                model=model.id, prompt="abc", max_tokens=4, temperature=0, extra_body={**GO_ON, **asked}
            )
            assert set(reply.choices[0].model_extra["depth"]) == {loops}  # type: ignore[index]


# Clients that do not read


def rest(raw: socket.socket) -> bytes:
    """All that still comes over a connection, until it is closed or torn off."""
    found = bytearray()
    try:
        while delta := raw.recv(1 << 16):
            found += delta
            if found.endswith(b"\r\n0\r\n\r\n"):
                break
    except ConnectionResetError:
        pass
    return bytes(found)


def answers(client: OpenAI, runtime: Runtime) -> bool:
    reply = client.completions.create(prompt="xyz", **GREEDY, extra_body=GO_ON)
    return reply.choices[0].text == runtime.generate("xyz", max_tokens=12, ignore_eos=True).text


def test_a_client_that_does_not_read_is_cut_before_what_it_left_unread_grows_too_large(
    served_package: Path, served_runtime: Runtime
) -> None:
    with Server(served_package, "--slots", 2, "--max-unread", 200) as server:
        raw = send(server, UNREAD, "/v1/chat/completions")
        seen = []
        with ThreadPoolExecutor(1) as pool:  # the gauge is above 0 for a moment only: it is read without a pause
            honest = pool.submit(answers, server.client(), served_runtime)
            while not seen or not idle(server):
                seen.append(server.metrics()["melt_unread_tokens"])
            assert honest.result()
        assert 0 < max(seen) <= 200
        assert cancelled(server) == 1
        assert server.metrics()["melt_unread_tokens"] == 0
        found = rest(raw)
        raw.close()
    assert b"tokens behind; this server keeps 200 for all" in found
    assert b"[DONE]" not in found
    assert found.count(b'"token_ids"') < 3500


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system cannot tell who takes nothing")
def test_a_client_that_takes_nothing_for_too_long_is_cut(served_package: Path, served_runtime: Runtime) -> None:
    with Server(served_package, "--stall", 2, before=SLOWS_DOWN) as server:
        raw = send(server, UNREAD, "/v1/chat/completions")
        assert answers(server.client(), served_runtime)
        eventually(lambda: any(line.get("path") == "/v1/chat/completions" for line in server.log()))
        eventually(lambda: cancelled(server) == 1)
        assert server.metrics()["melt_unread_tokens"] == 0
        eventually(lambda: idle(server))
        assert b"[DONE]" not in rest(raw)
        raw.close()


def test_what_was_refused_in_part_leaves_nothing_unread(tiny_package: Path) -> None:
    runtime = Runtime.load(tiny_package)
    request = Request((5, 6, 7), runtime.options(max_tokens=90, ignore_eos=True))

    async def refuse() -> int:
        backlog = Backlog(40)
        with Scheduler(runtime, 1, max_waiting=0) as scheduler:
            with pytest.raises(BusyError):
                Feed(scheduler, [request, request], backlog)
            while scheduler.metrics().requests["cancelled"] < 1:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
        return backlog.unread

    assert asyncio.run(refuse()) == 0


def test_of_all_readers_the_one_that_is_furthest_behind_is_cut(tiny_package: Path) -> None:
    runtime = Runtime.load(tiny_package)
    requests = [Request((5, 6, 7), runtime.options(max_tokens=count, ignore_eos=True)) for count in (90, 8, 60)]

    async def read() -> tuple[list[list[Event]], int]:
        backlog = Backlog(40)
        with Scheduler(runtime, 3) as scheduler:
            asleep, late = (Feed(scheduler, [request], backlog) for request in requests[:2])
            while scheduler.metrics().generated_tokens < 30:  # so that the newcomer cannot be further behind
                await asyncio.sleep(0.001)
            quick = Feed(scheduler, [requests[2]], backlog)
            read_first = [event async for _, event in quick]
            return [read_first, *[[event async for _, event in feed] for feed in (asleep, late)]], backlog.unread

    (quick, asleep, late), unread = asyncio.run(read())
    assert unread == 0
    assert [len(quick), len(late)] == [60 + 1, 8 + 1]
    (error,) = asleep
    assert isinstance(error, MeltError)
    assert re.fullmatch(r"the client is \d\d tokens behind; this server keeps 40 for all", str(error))
