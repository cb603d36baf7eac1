"""Connections within bounds: how many, how large their headers, and how long one may keep the server waiting."""

from __future__ import annotations

import asyncio
import math
import os
from dataclasses import dataclass
from time import monotonic
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ArgumentError
from .failures import ApiError

MAX_CONNECTIONS = 512  # where the system allows as many
HEADER_BYTES = 64 << 10  # of a request's line and headers
HEADER_SECONDS = 15.0  # from the connection, or the answer before, to the last byte of the headers
UNTAKEN_SECONDS = 5.0  # after which an answer that its client does not take may make room for others
_SMALL = 32  # bytes of a body's piece on average, where it comes in more than _PIECES: each costs a turn of the server
_PIECES = 1024
_BACKLOG = 128  # connections that are accepted in one go
_SPARE_FILES = 24  # that the process may yet open besides connections


@dataclass(frozen=True)
class Room:
    """How many connections there may be, and how many more are accepted before the first of them is looked at."""

    connections: int
    backlog: int


def room(asked: int | None) -> Room:
    """So much that accepting never fails for want of file descriptors, which would shut everybody out.

    asked: connections; None takes as many as is sensible. Raises ArgumentError for more than the system allows.
    """
    free = _free_files()
    if free is None:
        return Room(MAX_CONNECTIONS if asked is None else asked, _BACKLOG)
    backlog = min(_BACKLOG, max(free // 2, 1))
    if asked is None:
        asked = min(MAX_CONNECTIONS, free - backlog)
    else:
        backlog = min(_BACKLOG, free - asked)
    if asked < 1 or backlog < 1:
        raise ArgumentError(
            f"{max(asked, 1)} connections need more file descriptors than the {max(free, 0)} that the system leaves; "
            "raise the limit (ulimit -n), or lower --max-connections"
        )
    return Room(asked, backlog)


def _free_files() -> int | None:
    """File descriptors that connections may take; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 64
    return None if most == resource.RLIM_INFINITY else most - used - _SPARE_FILES


class _Pieces(h11.Connection):
    """Reads requests, and refuses a body that comes in many tiny chunks."""

    _count = _bytes = 0

    def next_event(self) -> Any:
        """What came next. Raises h11.RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._count += 1
            self._bytes += len(event.data)
            if self._count > _PIECES + self._bytes // _SMALL:
                raise h11.RemoteProtocolError("the body comes in too many small chunks", error_status_hint=413)
        elif isinstance(event, h11.Request):
            self._count = self._bytes = 0
        return event


class Connection(H11Protocol):
    """A connection of HTTP/1.1. At most ``most`` are open: for one more, the one that has kept the server waiting for
    longest goes, for its headers, its body or its next request; else the one that has not taken its answer for longest;
    if all do, the new one is answered with 503."""

    most = MAX_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._since = monotonic()
        self._late: asyncio.TimerHandle | None = None
        self._blocked: float | None = None  # since when the client takes nothing of a long answer
        self.conn = _Pieces(h11.SERVER, HEADER_BYTES)
        self._watch()
        if len(self.connections) > self.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """An answer is on its way."""
        super().on_response_complete()
        self._since = monotonic()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._watch()

    def pause_writing(self) -> None:
        """The client does not take as much as there is."""
        super().pause_writing()
        self._blocked = monotonic()

    def resume_writing(self) -> None:
        """It took most of it."""
        super().resume_writing()
        self._blocked = None

    @property
    def untaken(self) -> float | None:
        """Since when an answer lies here that the client does not take; None: none does."""
        if self._blocked is not None:
            return self._blocked
        done = self.cycle is not None and self.cycle.response_complete
        return self._since if done and self.transport.get_write_buffer_size() > 0 else None

    @property
    def answering(self) -> bool:
        """Whether a request is being answered, its body being here, or an answer has not been taken yet."""
        cycle = self.cycle
        asked = cycle is not None and not cycle.response_complete and (cycle.response_started or not cycle.more_body)
        return asked or self.transport.get_write_buffer_size() > 0

    def _watch(self) -> None:
        """Times the headers, and nothing else: a request's body has a limit of its own."""
        between = (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()
        if between and self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)
        elif not between and self._late is not None:
            self._late.cancel()
            self._late = None

    def _make_room(self) -> None:
        """Ends the connection that has kept the server waiting for longest."""
        others = [one for one in self.connections if isinstance(one, Connection) and one is not self]
        waiting = [one for one in others if not one.answering]
        if waiting:
            min(waiting, key=lambda one: one._since).transport.abort()
            return
        untaken = [(since, one) for one in others if (since := one.untaken) is not None]
        since, longest = min(untaken, key=lambda one: one[0], default=(math.inf, self))
        if since < monotonic() - UNTAKEN_SECONDS:
            longest.transport.abort()
            return
        body = ApiError(503, f"all {self.most} connections are in use; try again in a second", code="busy").response()
        lines = [b"HTTP/1.1 503 Service Unavailable", b"connection: close", b"retry-after: 1"]
        lines += [name + b": " + value for name, value in body.raw_headers]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + bytes(body.body))
        self.transport.close()


def bounded(most: int) -> type[Connection]:
    """The protocol with a limit of its own."""
    fields: dict[str, Any] = {"most": most}
    return type("BoundedConnection", (Connection,), fields)
