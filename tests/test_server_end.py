"""How a server ends: in time, whatever hangs, with an event at the end of each cut stream; and how it is seen to be
stuck before. Nothing here asserts on time; a server that does not end in a minute fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError
from processes import started
from serving import WAIT, Server, eventually
from test_server_attacks import HALF, connect
from test_server_life import LONG, send
from test_server_limits import UNREAD, rest

STREAM = LONG | {"stream": True}
# The backend stands still for as long as a file is there.
STANDS = """
import os, time
from melt_runtime.backends.onnxruntime_cpu import OnnxRuntimeState
run = OnnxRuntimeState.run
def stands(*arguments):
    while os.path.exists({!r}):
        time.sleep(0.01)
    run(*arguments)
OnnxRuntimeState.run = stands
"""
# Asked for its metrics, the event loop itself hangs.
HANGS = """
import time
from melt_runtime.server import app
app.prometheus = lambda *_: time.sleep(3600)
"""


def events(found: bytes) -> list[str]:
    """The data of a stream's events."""
    lines = found.decode().splitlines()
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def ready(server: Server) -> tuple[int, str | None]:
    """The status of /ready, and the code of its error."""
    reply = httpx.get(f"{server.url}/ready", timeout=WAIT)
    return reply.status_code, reply.json().get("error", {}).get("code")


def promptly_healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=0.5).status_code == 200
    except httpx.ReadTimeout:
        return False


@pytest.fixture
def stop(tmp_path: Path) -> Path:
    return tmp_path / "stop"


@pytest.fixture
def stuck(served_package: Path, stop: Path) -> Iterator[Server]:
    """A server whose backend can be made to stand still, and that sees it after half a second."""
    with Server(served_package, "--watchdog", 0.5, "--drain", 1, before=STANDS.format(str(stop))) as server:
        yield server


def test_a_thread_that_stands_still_is_told_at_ready_until_it_moves_again(stuck: Server, stop: Path) -> None:
    assert ready(stuck) == (200, None)
    with ThreadPoolExecutor(1) as pool:
        stop.touch()
        asked = pool.submit(stuck.client().completions.create, model="tiny", prompt="abc", max_tokens=2)
        eventually(lambda: ready(stuck) == (503, "stuck"))
        assert stuck.answers("/health")
        stop.unlink()
        assert asked.result(WAIT).choices[0].finish_reason in ("stop", "length")
    eventually(lambda: ready(stuck) == (200, None))


def test_sigterm_ends_a_server_that_is_stuck_and_tells_its_streams(stuck: Server, stop: Path) -> None:
    raw = send(stuck, STREAM | {"n": 3})
    assert raw.recv(1)
    stop.touch()
    stuck.process.send_signal(signal.SIGTERM)
    found = rest(raw)
    assert stuck.end() == 0
    raw.close()
    assert "did not come back from a loop" in json.loads(events(found)[-1])["error"]["message"]
    assert stuck.log()[-1]["event"] == "stopped"


def test_sigterm_ends_a_server_whose_event_loop_hangs(served_package: Path) -> None:
    with Server(served_package, "--drain", 0, before=HANGS) as server:
        with connect(server) as raw:
            raw.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            eventually(lambda: not promptly_healthy(server))
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


# A signal comes when the server says that it listens, before its loop runs.
EARLY = """
import os, signal
import uvicorn
run = uvicorn.Server.run
def told_before(*arguments, **named):
    os.kill(os.getpid(), signal.{})
    run(*arguments, **named)
uvicorn.Server.run = told_before
from melt_runtime.cli.main import main; main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_that_comes_before_the_loop_runs_ends_the_server(served_package: Path, name: str) -> None:
    command = [sys.executable, "-c", EARLY.format(name), "serve", served_package, "--port", 0, "--threads", 1]
    with started(command, WAIT, stderr=subprocess.PIPE, text=True) as process:
        _, written = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert json.loads(written.splitlines()[-1])["event"] == "stopped"


# Python itself does not come to its end.
LINGERS = """
import time
class Lingers:
    def __del__(self):
        time.sleep(3600)
lingers = Lingers()
"""


def test_the_process_ends_without_pythons_own_end(served_package: Path) -> None:
    with Server(served_package, before=LINGERS) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert server.log()[-1]["event"] == "stopped"


@pytest.mark.parametrize("loops", [4, 1000])
def test_a_stream_that_is_cut_at_the_end_says_so_in_its_last_event(served_package: Path, loops: int) -> None:
    with Server(served_package, "--drain", 0, "--max-loops", 1000) as server:
        raw = send(server, STREAM | {"loops": loops})
        assert raw.recv(1)
        server.process.send_signal(signal.SIGTERM)
        found = rest(raw)
        raw.close()
        assert server.end() == 0
    assert found.endswith(b"\r\n0\r\n\r\n")
    assert json.loads(events(found)[-1])["error"]["code"] == "cancelled"


def test_while_it_drains_it_is_healthy_and_not_ready_and_takes_nothing_new(served_package: Path) -> None:
    with Server(served_package, "--drain", 60) as server:
        stream = iter(server.client().completions.create(**openai(STREAM | {"max_tokens": 1500})))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: ready(server) == (503, "closed"))
        assert server.answers("/health")
        with pytest.raises(APIStatusError) as caught:
            server.client().completions.create(model="tiny", prompt="abc")
        assert (caught.value.status_code, caught.value.code) == (503, "closed")
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
        assert server.end() == 0


def openai(body: dict[str, Any]) -> Any:
    """A body as the official client takes it."""
    return {**{key: body[key] for key in body if key != "ignore_eos"}, "extra_body": {"ignore_eos": True}}


def test_a_second_signal_cuts_at_once(served_package: Path) -> None:
    with Server(served_package, "--drain", 3600) as server:
        raw = send(server, STREAM)
        assert raw.recv(1)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: ready(server) == (503, "closed"))
        server.process.send_signal(signal.SIGINT)
        found = rest(raw)
        assert server.end() == 0
        raw.close()
    assert "error" in json.loads(events(found)[-1])


def test_clients_that_send_nothing_more_or_take_nothing_do_not_hold_it_up(served_package: Path) -> None:
    with Server(served_package, "--drain", 0) as server:
        unread = send(server, UNREAD, "/v1/chat/completions")
        assert unread.recv(1)
        idle, half = connect(server), connect(server)
        half.sendall(HALF)
        assert server.answers("/health")
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert not any("traceback" in line for line in server.log())
        for raw in (unread, idle, half):
            raw.close()
