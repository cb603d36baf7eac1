"""What the server refuses, and that it goes on as if nothing had been: bodies, keys, addresses, a full queue."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from melt_runtime.cli.main import app
from melt_runtime.server.guard import is_loopback
from openai import AuthenticationError, BadRequestError, NotFoundError, RateLimitError
from serving import WAIT, Server, eventually
from typer.testing import CliRunner

KEY = "one of two keys"
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 2}
LONG: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 4000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(served_package: Path) -> Iterator[Server]:
    options = ["--slots", 1, "--max-waiting", 1, "--max-body", 5000, "--log-prompts"]
    with Server(served_package, *options, MELT_API_KEYS=f"another,{KEY}") as server:
        yield server


def post(server: Server, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
    """A request with the right key. body: bytes, or what becomes JSON."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **options.pop("headers", {})}
    what = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx.post(server.url + path, headers=headers, timeout=WAIT, **what, **options)


def refusal(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a reply, whose shape is checked."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "tiny", "prompt": "\\ud800"}', b"[" * 4000],
    ids=["empty", "cut", "list", "null", "no-utf8", "surrogate", "deep"],
)
def test_a_malformed_body_is_refused(server: Server, body: bytes) -> None:
    assert refusal(post(server, body), 400)["type"] == "invalid_request_error"
    assert post(server, COMPLETION).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1 << 31}, "max_tokens"),
        ({"exit_threshold": 1.5}, "exit_threshold"),
        ({"loops": 0}, "loops"),
        ({"n": 129}, "n"),
        ({"n": 3}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"logit_bias": {"five": 1.0}}, None),
        ({"logit_bias": {"104": 1.0}}, None),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ["abc"] * 3}, "prompt"),
        ({"echo": "yes"}, "echo"),
        ({"nonsense": 1}, "nonsense"),
        ({"temperature": -1.0}, None),
        ({"top_p": 2.0}, None),
        ({"seed": 1 << 63}, "seed"),
        ({"top_k": -2}, None),
        ({"stop": ""}, None),
        ({"stop": [str(i) for i in range(300)]}, None),
        ({"min_loops": 5, "loops": 4}, None),
        ({"prompt": []}, None),
        ({"prompt": ""}, None),
        ({"prompt": [10**6]}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"multipleOf": 988_027}}}}, None),
    ],
    ids=lambda value: str(value)[:80],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(
    server: Server, change: dict[str, Any], param: str | None
) -> None:
    error = refusal(post(server, COMPLETION | change), 400)
    assert param is None or error["param"].startswith(param)


def test_a_body_above_the_limit_is_refused_whether_or_not_it_says_its_size(server: Server) -> None:
    def deltas() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    large = COMPLETION | {"prompt": "a" * 6000}
    assert refusal(post(server, large), 413)["code"] == "body_too_large"
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    reply = httpx.post(f"{server.url}/v1/completions", content=deltas(), headers=headers, timeout=WAIT)
    assert reply.status_code == 413


def test_a_body_that_is_not_said_to_be_json_is_refused(server: Server) -> None:
    refusal(post(server, b"{}", headers={"Content-Type": "text/plain"}), 415)


def test_bytes_that_are_no_http_do_not_disturb_the_server(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), WAIT) as raw:
        raw.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    assert post(server, COMPLETION).status_code == 200


def test_an_unknown_model_and_an_unknown_path_are_not_found(server: Server) -> None:
    with pytest.raises(NotFoundError) as caught:
        server.client(KEY).completions.create(**COMPLETION | {"model": "other"})
    assert caught.value.code == "model_not_found"
    refusal(post(server, {}, "/v1/nothing"), 404)


@pytest.mark.parametrize("key", ["none", KEY + "x", KEY[:-1], "another," + KEY])
def test_a_wrong_key_is_refused(server: Server, key: str) -> None:
    reply = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=WAIT)
    assert refusal(reply, 401)["type"] == "authentication_error"
    assert httpx.get(f"{server.url}/metrics", timeout=WAIT).status_code == 401


def test_every_key_is_good_and_health_needs_none(server: Server) -> None:
    for key in (KEY, "another"):
        assert server.client(key).models.list().data[0].id == "tiny"
    with pytest.raises(AuthenticationError):
        server.client("third").models.list()
    assert all(server.answers(path) for path in ("/health", "/ready", "/"))


def test_a_full_queue_is_said_with_the_time_to_try_again(server: Server) -> None:
    client = server.client(KEY)
    streams = [client.completions.create(**LONG, stream=True) for _ in range(2)]
    next(iter(streams[0]))
    with pytest.raises(RateLimitError) as caught:
        client.completions.create(**COMPLETION)
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    for stream in streams:
        stream.close()


def test_choices_that_only_partly_fit_do_not_run_at_all(server: Server) -> None:
    client = server.client(KEY)
    eventually(lambda: state(server) == (0, 0))
    with client.completions.create(**LONG, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(RateLimitError):
            client.completions.create(**COMPLETION | {"n": 2})
    eventually(lambda: state(server) == (0, 0))


def state(server: Server) -> tuple[int, int]:
    """How many run and wait."""
    found = httpx.get(f"{server.url}/v1/state", headers={"Authorization": f"Bearer {KEY}"}, timeout=WAIT).json()
    return found["running"], found["waiting"]


def test_a_prompt_is_in_the_log_if_it_was_asked_for(server: Server) -> None:
    post(server, COMPLETION | {"prompt": "not a secret"})
    eventually(lambda: any(line.get("prompt") == "not a secret" for line in server.log()))


def test_a_page_elsewhere_cannot_reach_a_server_without_keys_under_its_own_name(served_package: Path) -> None:
    with Server(served_package, "--max-tokens", 5) as server:
        reply = httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example:80"}, timeout=WAIT)
        refusal(reply, 403)
        assert server.answers("/v1/models")
        with pytest.raises(BadRequestError, match="allows 5"):
            server.client().completions.create(**COMPLETION | {"max_tokens": 6})


# Before it starts


def refused(served_package: Path, *options: object, **environment: str) -> str:
    """The one line of a command that does not start."""
    result = CliRunner().invoke(app, ["serve", str(served_package), *map(str, options)], env=environment)
    assert result.exit_code == 2, result.output
    return result.stderr


def test_an_address_that_others_reach_needs_a_key(served_package: Path) -> None:
    assert "--without-key" in refused(served_package, "--host", "0.0.0.0", "--port", 0)


def test_keys_and_their_absence_cannot_be_asked_for_together(tmp_path: Path) -> None:
    package, keys, options = tmp_path / "package", tmp_path / "keys", tmp_path / "melt.toml"
    keys.write_text(KEY)
    options.write_text(f"[serve]\napi-key-file = {str(keys)!r}\n")
    for host in ("127.0.0.1", "0.0.0.0"):
        asked = ("--without-key", "--host", host, "--port", 0)
        assert "--without-key admits everyone, and MELT_API_KEYS" in refused(package, *asked, MELT_API_KEYS=KEY)
        assert f"and --api-key-file {keys}" in refused(package, *asked, "--api-key-file", keys)
        assert f"and --api-key-file {keys}" in refused(package, *asked, "--config", options)


def test_keys_that_were_asked_for_must_be_there(served_package: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n \n")
    assert "there is none" in refused(served_package, "--api-key-file", tmp_path / "keys")
    assert "there is none" in refused(served_package, MELT_API_KEYS="")
    assert "cannot be read" in refused(served_package, "--api-key-file", tmp_path / "other")


def test_a_certificate_needs_its_key(served_package: Path) -> None:
    assert "belong together" in refused(served_package, "--tls-cert", "cert.pem")


def test_a_certificate_that_cannot_be_used_is_named(served_package: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text("nothing of the kind")
    said = refused(served_package, "--tls-cert", cert, "--tls-key", key)
    assert said == f"melt-run: --tls-key {key} cannot be read: No such file or directory\n"
    os.mkfifo(key)  # nobody writes into it, so that whoever opens it waits
    for odd in (key, Path("/dev/zero")):
        said = refused(served_package, "--tls-cert", cert, "--tls-key", odd)
        assert said == f"melt-run: --tls-key {odd} is a pipe or a device; it must be a file\n"
    key.unlink()
    key.write_text("nothing either")
    said = refused(served_package, "--tls-cert", cert, "--tls-key", key)
    assert said.startswith(f"melt-run: --tls-cert {cert} and --tls-key {key} are no certificate chain")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("option", ["--stall", "--drain"])
def test_seconds_that_no_clock_counts_are_refused(served_package: Path, option: str) -> None:
    assert f"Invalid value for '{option}'" in refused(served_package, option, 10**11)


def test_a_port_that_is_taken_is_said_in_a_line(served_package: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in refused(served_package, "--port", taken.getsockname()[1])


def test_loopback_is_told_from_other_addresses() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "localhost.evil.example", "")))
