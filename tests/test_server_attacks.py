"""Clients that mean harm: headers and bodies without an end, connections that say nothing, prompts that cannot fit.

An honest client is answered meanwhile, the memory stays, and the log holds no traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from melt_runtime import BusyError, PromptError, Runtime
from melt_runtime.machine import resident
from melt_runtime.server.failures import ApiError
from melt_runtime.server.guard import Guard, Keys
from melt_runtime.server.intake import Preparation, Uploads
from melt_runtime.server.prompts import check_length
from openai import BadRequestError
from serving import WAIT, Server, eventually
from starlette.requests import Request
from test_server_limits import refused
from tokenizers import Tokenizer, models, pre_tokenizers

HASTY = """
from melt_runtime.server import connection, intake
connection.HEADER_SECONDS, intake.BODY_SECONDS, connection.UNTAKEN_SECONDS = 1.0, 2.0, 0.5
"""
MOST = 16  # connections
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALF = HEAD + b"Content-Length: 900\r\n\r\n{"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server(served_package: Path) -> Iterator[Server]:
    """A server with little patience."""
    with Server(served_package, "--max-connections", MOST, before=HASTY) as server:
        yield server


@pytest.fixture(autouse=True)
def calm(server: Server) -> Iterator[None]:
    """After each attack an honest client is answered, and the log is one of JSON without tracebacks."""
    yield
    assert answered(server)
    records = [json.loads(line) for line in list(server.lines)]
    assert not any("traceback" in record for record in records)


def answered(server: Server) -> bool:
    reply = server.client().completions.create(model="tiny", prompt="abc", max_tokens=2)
    return reply.choices[0].finish_reason in ("stop", "length")


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), WAIT)


def rest(raw: socket.socket) -> bytes:
    """What still comes, until the server ends the connection; a timeout if it does not."""
    found = bytearray()
    try:
        while delta := raw.recv(1 << 16):
            found += delta
    except ConnectionError:
        pass
    return bytes(found)


@pytest.mark.parametrize("line", [b"X-Long: " + b"a" * 1000 + b"\r\n", b"a" * 1000], ids=["lines", "one"])
def test_headers_without_an_end_are_cut_and_take_no_memory(server: Server, line: bytes) -> None:
    before, sent = resident("VmRSS", server.process.pid), 0
    with connect(server) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        with contextlib.suppress(ConnectionError):
            while sent < 200 << 20:
                raw.sendall(line * 100)
                sent += 100 * len(line)
    assert sent < 200 << 20
    after = resident("VmRSS", server.process.pid)
    assert before is not None
    assert after is not None
    assert after - before < 20 << 20


@pytest.mark.parametrize("said", [b"", GET[:-4], GET + b"\r\nG"], ids=["nothing", "headers", "second"])
def test_a_connection_that_says_nothing_more_is_ended(server: Server, said: bytes) -> None:
    with connect(server) as raw:
        raw.sendall(said)
        found = rest(raw)
    assert found.startswith(b"HTTP/1.1 200") == said.endswith(b"G")


def test_a_connection_that_says_its_headers_too_slowly_is_ended(server: Server) -> None:
    with connect(server) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n")
        raw.settimeout(0.05)
        for _ in range(int(WAIT / 0.05)):
            try:
                raw.sendall(b"X")
                assert raw.recv(10) == b""
                break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            raise AssertionError("it never ended")


def test_a_body_that_does_not_come_is_told_and_ended(server: Server) -> None:
    with connect(server) as raw:
        raw.sendall(HALF)
        assert rest(raw).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("said", [b"", GET, HALF], ids=["nothing", "headers", "body"])
def test_connections_that_wait_make_room_for_one_that_asks(server: Server, said: bytes) -> None:
    waiting = []
    for _ in range(3 * MOST):
        raw = connect(server)
        raw.sendall(said)
        waiting.append(raw)
    assert answered(server)
    for raw in waiting:
        rest(raw)
        raw.close()


def test_connections_that_are_all_being_answered_keep_their_place(server: Server) -> None:
    body = json.dumps({"model": "tiny", "prompt": "abc", "max_tokens": 4000, "ignore_eos": True, "stream": True})
    head = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode()
    streams = []
    for _ in range(MOST):
        raw = connect(server)
        raw.sendall(head + body.encode())
        streams.append(raw)
    for raw in streams:
        assert raw.recv(1) == b"H"
    with connect(server) as one_more:
        found = rest(one_more)
    assert found.startswith(b"HTTP/1.1 503")
    assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["code"] == "busy"
    for raw in streams:
        raw.close()
    eventually(lambda: server.answers("/ready"))


def test_connections_that_do_not_take_their_answers_make_room(server: Server) -> None:
    greedy = []
    for _ in range(MOST):
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.connect(("127.0.0.1", server.port))
        raw.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            raw.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
        greedy.append(raw)
    eventually(lambda: server.answers("/ready"))
    assert answered(server)
    for raw in greedy:
        raw.close()


def test_a_body_in_many_tiny_chunks_is_refused(server: Server) -> None:
    body = json.dumps({"model": "tiny", "prompt": "abc", "user": "x" * 20_000}).encode()
    with connect(server) as raw:
        raw.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            raw.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert not rest(raw).startswith(b"HTTP/1.1 200")


def test_a_body_in_chunks_is_answered(server: Server) -> None:
    body = json.dumps({"model": "tiny", "prompt": "abc", "max_tokens": 2, "user": "x" * 200_000}).encode()
    deltas = [body[at : at + 64] for at in range(0, len(body), 64)]
    reply = httpx.post(
        f"http://127.0.0.1:{server.port}/v1/completions",
        content=iter(deltas),
        headers={"Content-Type": "application/json"},
        timeout=WAIT,
    )
    assert reply.status_code == 200


def test_with_few_file_descriptors_everybody_is_still_answered(served_package: Path) -> None:
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"
    with Server(served_package, before=HASTY + few) as server:
        waiting = [connect(server) for _ in range(300)]
        assert answered(server)
        assert len(server.log()) == len(server.lines)
        assert not any("traceback" in line for line in server.log())
        for raw in waiting:
            raw.close()


def test_more_connections_than_there_are_file_descriptors_are_refused(served_package: Path) -> None:
    assert "ulimit -n" in refused(served_package, "--port", 0, "--max-connections", 10**7)


def test_a_client_that_leaves_while_it_uploads_is_a_line_in_the_log(server: Server) -> None:
    count = len([line for line in server.log() if line.get("status") == 499])
    with connect(server) as raw:
        raw.sendall(HALF)
        eventually(lambda: server.answers("/health"))
    eventually(lambda: len([line for line in server.log() if line.get("status") == 499]) == count + 1)


@pytest.mark.parametrize("second", ["localhost", "evil.example"])
def test_two_host_headers_are_refused(server: Server, second: str) -> None:
    with connect(server) as raw:
        raw.sendall(f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: {second}\r\n\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("name", [b"host", b"authorization"])
def test_two_headers_of_which_there_is_one_are_refused_behind_any_server(name: bytes) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(*_: Any) -> None:
        raise AssertionError("it was let in")

    headers = [(name, b"localhost"), (b"accept", b"*/*"), (name, b"other")]
    scope: Any = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    asyncio.run(Guard(app, Keys(), False)(scope, None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 400


def test_no_websocket_is_opened(server: Server) -> None:
    with connect(server) as raw:
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        raw.sendall(GET + upgrade + b"Sec-WebSocket-Key: YQ==\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 200")


def test_the_page_stands_in_no_other_page(server: Server) -> None:
    policy = httpx.get(server.url, timeout=WAIT).headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy
    assert "base-uri 'none'" in policy


# Loops


@pytest.mark.parametrize("loops", [17, 10**9])
def test_loops_beyond_the_servers_bound_are_refused_by_name(server: Server, loops: int) -> None:
    assert server.client().models.list().data[0].model_extra["max_loops"] == 16  # type: ignore[index]
    with pytest.raises(BadRequestError, match=f"loops is {loops}; this server allows 16"):
        server.client().completions.create(model="tiny", prompt="abc", extra_body={"loops": loops})


def test_the_bound_of_loops_holds_for_who_says_nothing_too(served_package: Path) -> None:
    with Server(served_package, "--max-loops", 2) as server:
        choice = server.client().completions.create(model="tiny", prompt="abc", max_tokens=3).choices[0]
        assert set(choice.model_extra["depth"]) == {2}  # type: ignore[index]
    assert "max-loops" in refused(served_package, "--max-loops", 10**9)


# Prompts


@pytest.mark.parametrize(
    "said",
    [
        {"prompt": "a" * 1_000_000},
        {"prompt": [5] * 300_000},
        {"messages": [{"role": "user", "content": "a" * 1_000_000}]},
        {"messages": [{"role": "user", "content": "a"}] * 20_000},
    ],
    ids=["text", "ids", "message", "messages"],
)
def test_long_prompts_are_refused(server: Server, said: dict[str, Any]) -> None:
    path = "chat/completions" if "messages" in said else "completions"
    reply = httpx.post(f"{server.url}/v1/{path}", json={"model": "tiny", **said}, timeout=WAIT)
    assert reply.status_code == 400
    assert "do not fit" in reply.json()["error"]["message"]


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self.tokenizer.encode_batch(texts, **options)


def small(tokenizer: Tokenizer) -> Any:
    """As much of a runtime as a check of length looks at, with room for 8 tokens."""
    ours, manifest = SimpleNamespace(backend_tokenizer=Counting(tokenizer)), SimpleNamespace(max_seq_len=8)
    return SimpleNamespace(tokenizer=ours, manifest=manifest)


def test_of_a_prompt_that_cannot_fit_only_the_beginning_is_tokenized(served_runtime: Runtime) -> None:
    assert served_runtime.tokenizer is not None
    runtime = small(served_runtime.tokenizer.backend_tokenizer)
    with pytest.raises(PromptError, match="1,000,000 characters do not fit"):
        check_length(runtime, "a" * 1_000_000)
    assert runtime.tokenizer.backend_tokenizer.characters == 8 * 16


def test_a_text_of_few_long_tokens_is_not_refused_for_its_length() -> None:
    word = "b" * 500
    tokenizer = Tokenizer(models.WordLevel({word: 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    runtime, text = small(tokenizer), " ".join([word] * 8)
    check_length(runtime, text)
    assert runtime.tokenizer.backend_tokenizer.characters <= 2 * len(text)
    with pytest.raises(PromptError):
        check_length(runtime, " ".join([word] * 60))


# Bodies and calls on their way


def test_of_bodies_that_come_at_once_the_largest_is_cut_when_they_are_too_much() -> None:
    uploads = Uploads(1000)

    async def body(size: int, done: asyncio.Event) -> bytes:
        deltas = iter([size // 2, size - size // 2])

        async def receive() -> Any:
            if (size := next(deltas, 0)) == 0:
                await done.wait()
            await asyncio.sleep(0.01)
            return {"type": "http.request", "body": b"a" * size, "more_body": bool(size)}

        headers = [(b"content-type", b"application/json")]
        return await uploads.read(Request({"type": "http", "headers": headers}, receive), 10_000)

    async def both() -> list[Any]:
        done = asyncio.Event()
        asyncio.get_running_loop().call_later(0.2, done.set)
        return await asyncio.gather(body(600, done), body(500, done), return_exceptions=True)

    large, small = asyncio.run(both())
    assert isinstance(large, ApiError)
    assert large.status == 408
    assert small == b"a" * 500
    assert not uploads._sizes


def test_calls_that_wait_to_be_prepared_are_so_many_and_no_more() -> None:
    async def crowd() -> list[Any]:
        preparation = Preparation(3)
        found = await asyncio.gather(*(preparation.run(lambda: 1) for _ in range(5)), return_exceptions=True)
        return [*found, await preparation.run(lambda: 2)]

    found = asyncio.run(crowd())
    assert found[:3] == [1, 1, 1]
    assert all(isinstance(one, BusyError) for one in found[3:5])
    assert found[5] == 2
