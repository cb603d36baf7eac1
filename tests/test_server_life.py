"""Clients that come at once, read slowly or go; a server that is told to stop, killed, and started again."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from melt_runtime import Runtime
from serving import WAIT, Server, eventually

LONG: dict[str, Any] = {"model": "tiny", "prompt": "abc", "temperature": 0, "max_tokens": 4000, "ignore_eos": True}


def send(server: Server, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """A raw connection with a request on it, whose reply takes little room on the way."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    raw.settimeout(WAIT)
    raw.connect(("127.0.0.1", server.port))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    raw.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    return raw


def idle(server: Server) -> bool:
    """Whether nobody runs or waits."""
    now = server.metrics()
    return now["melt_requests_running"] == now["melt_requests_waiting"] == 0


def cancelled(server: Server) -> float:
    return server.metrics()['melt_requests_total{outcome="cancelled"}']


def test_thirty_two_clients_at_once_each_get_what_they_get_alone(server: Server, served_runtime: Runtime) -> None:
    client = server.client()
    work = [(f"prompt {number}", 1 + number % 4, 3 + number % 17) for number in range(32)]

    def ask(prompt: str, loops: int, tokens: int) -> str:
        asked: Any = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        parts = client.completions.create(**asked, stream=True, extra_body={"loops": loops, "ignore_eos": True})
        return "".join(part.choices[0].text for part in parts)

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda one: ask(*one), work))
    assert found == [
        served_runtime.generate(prompt, max_tokens=tokens, loops=loops, ignore_eos=True).text
        for prompt, loops, tokens in work
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(server: Server, stream: bool) -> None:
    before = server.metrics()
    raw = send(server, LONG | {"stream": stream, "n": 2})
    eventually(lambda: server.metrics()["melt_requests_running"] == 2)
    raw.close()
    eventually(lambda: idle(server))
    assert cancelled(server) - before['melt_requests_total{outcome="cancelled"}'] == 2
    assert server.metrics()["melt_generated_tokens_total"] - before["melt_generated_tokens_total"] < 2 * 4000


def test_a_stream_cut_half_way_by_the_official_client_frees_its_slot(server: Server) -> None:
    before = cancelled(server)
    extra = {"ignore_eos": True}
    with server.client().completions.create(
        model="tiny", prompt="abc", max_tokens=4000, stream=True, extra_body=extra
    ) as stream:
        for _ in range(3):
            next(iter(stream))
    eventually(lambda: cancelled(server) == before + 1 and idle(server))


def test_a_slow_reader_holds_nobody_up_and_gets_everything_in_the_end(server: Server, served_runtime: Runtime) -> None:
    asked = {**LONG, "stream": True, "max_tokens": 2500, "logprobs": True, "top_logprobs": 20}
    asked["messages"] = [{"role": "user", "content": asked.pop("prompt")}]
    slow = send(server, asked, "/v1/chat/completions")  # several megabytes: more than the system holds on the way
    assert slow.recv(1) == b"H"
    others: Any = {"model": "tiny", "prompt": "xyz", "temperature": 0, "max_tokens": 5}
    expected = served_runtime.generate("xyz", max_tokens=5, ignore_eos=True).text
    for _ in range(8):  # twice as many as there are slots
        assert server.client().completions.create(**others, extra_body={"ignore_eos": True}).choices[0].text == expected
    eventually(lambda: idle(server))  # its tokens are drawn though it has not read them
    found = bytearray()
    while not found.endswith(b"\r\n0\r\n\r\n"):
        found += slow.recv(1 << 16)
    slow.close()
    assert found.count(b'"token_ids"') == 2500
    assert b"data: [DONE]" in found


def test_a_killed_server_starts_again_on_its_port(served_package: Path) -> None:
    with Server(served_package) as first:
        raw = send(first, LONG | {"stream": True})
        raw.recv(1)
        first.process.kill()
        assert first.end() == -signal.SIGKILL
        raw.close()
    with Server(served_package, port=first.port) as second:
        assert second.port == first.port
        reply = second.client().completions.create(model="tiny", prompt="abc", max_tokens=3)
        assert reply.choices[0].finish_reason in ("length", "stop")


def test_sigterm_lets_a_stream_end_and_takes_nothing_new(served_package: Path) -> None:
    with Server(served_package, "--drain", 60) as server:
        stream = server.client().completions.create(
            model="tiny", prompt="abc", max_tokens=600, stream=True, extra_body={"ignore_eos": True}
        )
        parts = iter(stream)
        count = len(next(parts).choices)
        server.process.send_signal(signal.SIGTERM)
        for part in parts:
            count += len(part.choices)
        assert count == 600
        assert server.end() == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health", timeout=WAIT)
        assert server.log()[-1]["event"] == "stopped"


def test_sigterm_cuts_what_is_not_over_in_time(served_package: Path) -> None:
    with Server(served_package, "--drain", 0) as server:
        raw = send(server, LONG | {"stream": True, "n": 4})
        assert raw.recv(1)
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        found = b""
        while delta := raw.recv(1 << 16):
            found += delta
        assert b"[DONE]" not in found
        raw.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_with_a_certificate_it_speaks_https(served_package: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True, timeout=WAIT)
    with Server(served_package, "--tls-cert", certificate, "--tls-key", key) as server:
        assert server.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{server.url}/v1/models", verify=trusted, timeout=WAIT).json()["data"][0]["id"] == "tiny"
