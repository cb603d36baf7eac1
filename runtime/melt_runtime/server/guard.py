"""Access control by API keys and Host headers, and a log line per request."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from uuid import uuid4

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ArgumentError
from .failures import ApiError
from .logs import LEVELS, log

OPEN_PATHS = ("/", "/health", "/ready", "/docs", "/openapi.json")  # paths that need no key
PROBES = ("/health", "/ready", "/metrics")  # asked by machines every few seconds
_FACTS = "melt_facts"  # the scope's key for the fields of the request's log line


class Keys:
    """The API keys; without any, everyone is admitted. Only hashes are kept, and all are compared, so that timing
    reveals nothing."""

    def __init__(self, keys: Iterable[str] = ()):
        self._hashes = [_hash(key.encode()) for key in keys]

    @classmethod
    def read(cls, environment: str | None, file: Path | None) -> Keys:
        """Read keys from an environment variable, separated by commas, and a file, one per line. Raises
        ArgumentError."""
        found = [] if environment is None else environment.split(",")
        if file is not None:
            try:
                found += file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ArgumentError(f"the keys in {file} cannot be read: {error}") from error
        keys = [key.strip() for key in found if key.strip()]
        if not keys and (environment is not None or file is not None):
            raise ArgumentError("keys were asked for and there is none; give one, or neither variable nor file")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def admit(self, authorization: bytes) -> bool:
        """Return whether an Authorization header holds one of the keys."""
        if not self._hashes:
            return True
        scheme, _, given = authorization.partition(b" ")
        found = _hash(given.strip())
        right = [hmac.compare_digest(found, one) for one in self._hashes]
        return any(right) and scheme.lower() == b"bearer"


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def is_loopback(host: str) -> bool:
    """Return whether an address or host name is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Middleware for keys and hosts.

    ``local``: answer only Host headers that name this machine, so that web pages elsewhere cannot reach a server
    without keys through a visitor's browser.
    """

    def __init__(self, app: ASGIApp, keys: Keys, local: bool):
        self._app, self._keys, self._local = app, keys, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts = scope[_FACTS] = {"id": uuid4().hex, "method": scope["method"], "path": scope["path"]}
        started, status = perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", facts["id"].encode())]
            await send(message)

        try:
            refusal = self._refusal(scope)
            await (self._app if refusal is None else refusal.response())(scope, receive, watched)
        finally:
            quiet = scope["path"] in PROBES and status < 400
            level = LEVELS["debug" if quiet else "info"]
            log("request", level, **facts, status=status, seconds=round(perf_counter() - started, 4))

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        for name in (b"host", b"authorization"):
            if sum(one == name for one, _ in scope["headers"]) > 1:
                return ApiError(400, f"there are several {name.decode().title()} headers; a request has one")
        if self._local:
            host = headers.get(b"host", b"localhost").decode("latin-1")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if not is_loopback(name):
                return ApiError(403, f"this server answers to its own machine's names, not to {name[:100]!r}")
        if scope["path"] in OPEN_PATHS or self._keys.admit(headers.get(b"authorization", b"")):
            return None
        refusal = ApiError(401, "the API key is wrong or missing", code="invalid_api_key")
        refusal.headers["WWW-Authenticate"] = "Bearer"
        return refusal


def note(request: Request, **facts: object) -> None:
    """Add fields to the request's log line."""
    request.scope[_FACTS].update(facts)


def request_id(request: Request) -> str:
    """Return a request's id, as in log and reply."""
    return str(request.scope[_FACTS]["id"])
