"""Hostile clients for the soak: they send broken bodies, endless headers, costly grammars and stop strings, or nothing.

An attack fails if the server breaks (a status from 500 other than 503 and 504), or accepts what it must refuse.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

PAUSE = 0.05  # seconds between a client's attacks
_WAIT = 60.0
_IDLE = 32  # silent connections per client
_BASE: dict[str, Any] = {"model": "soak", "prompt": [5, 6, 7], "max_tokens": 2, "ignore_eos": True}
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Attack:
    """A hostile request. ``refused``: whether it must be answered with a status from 400 to 429."""

    name: str
    body: bytes
    refused: bool = True


def _asked(**fields: Any) -> bytes:
    return json.dumps(_BASE | fields).encode()


def _schema(schema: Any, **fields: Any) -> bytes:
    asked = {"type": "json_schema", "json_schema": {"schema": schema}}
    return _asked(response_format=asked, ignore_eos=False, **fields)


def bodies() -> list[Attack]:
    """Make all hostile bodies in advance, so that they cost the client nothing later."""
    many = {f"x{at}": at for at in range(50_000)}
    return [
        Attack("bad bodies", random.Random(0).randbytes(100_000)),
        Attack("bad bodies", b"[" * 500_000),
        Attack("bad bodies", _asked(**many)),
        Attack("bad bodies", _asked(prompt=["a", *[5] * 200_000])),
        Attack("bad bodies", _asked(seed=0).replace(b'"seed": 0', b'"seed": ' + b"9" * 5000)),
        Attack("long prompts", _asked(prompt="12 + 3 = " * 100_000)),
        Attack("long prompts", _asked(prompt=[5] * 200_000)),
        Attack("big grammars", _schema({"type": "integer", "multipleOf": 988_027}, n=4), refused=False),
        Attack("big grammars", _schema({"enum": [f"value {at}" for at in range(30_000)]}), refused=False),
        Attack("many stops", _asked(stop=[f"stop {at}" for at in range(60_000)])),
        Attack("many stops", _asked(stop=[chr(97 + at % 26) * 70 + str(at) for at in range(100)]), refused=False),
        Attack("absurd loops", _asked(loops=1_000_000_000)),
        Attack("absurd loops", _asked(loops=1_000_000_000, stream=True)),
    ]


class Attacker:
    """A hostile client."""

    def __init__(self, url: str, draw: random.Random):
        parts = urlsplit(url)
        self._url, self._draw, self._address = url, draw, (parts.hostname or "127.0.0.1", parts.port or 80)
        self._bodies, self._idle = bodies(), list[socket.socket]()

    def attack(self) -> str:
        """Make one random attack and return its name. Raises ValueError for a wrong answer."""
        raw: list[Callable[[], str]] = [self._endless_headers, self._half_a_body, self._vanish, self._silence]
        if self._draw.random() < 0.5:
            with contextlib.suppress(OSError):
                return self._draw.choice(raw)()
            return "cut connections"
        one = self._draw.choice(self._bodies)
        with contextlib.suppress(httpx.TransportError):  # the server closed the connection
            reply = httpx.post(f"{self._url}/v1/completions", content=one.body, headers=_JSON, timeout=_WAIT)
            wrong = reply.status_code >= 500 and reply.status_code not in (503, 504)
            if wrong or (one.refused and reply.status_code == 200):
                raise ValueError(f"status {reply.status_code}: {reply.text[:200]}")
        return one.name

    def close(self) -> None:
        """Close the silent connections."""
        for raw in self._idle:
            raw.close()

    def _connect(self) -> socket.socket:
        return socket.create_connection(self._address, _WAIT)

    def _endless_headers(self) -> str:
        with self._connect() as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            for at in range(100):
                raw.sendall(f"X-{at}: ".encode() + b"a" * 8000 + b"\r\n")
        return "endless headers"

    def _post(self, raw: socket.socket, body: bytes, length: int) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
        raw.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)

    def _half_a_body(self) -> str:
        with self._connect() as raw:
            self._post(raw, b"{" * 100_000, 900_000)
        return "vanished clients"

    def _vanish(self) -> str:
        with self._connect() as raw:
            body = _asked(max_tokens=500, stream=self._draw.random() < 0.5)
            self._post(raw, body, len(body))
        return "vanished clients"

    def _silence(self) -> str:
        self._idle.append(self._connect())
        if len(self._idle) > _IDLE:
            self._idle.pop(0).close()
        return "silent connections"
