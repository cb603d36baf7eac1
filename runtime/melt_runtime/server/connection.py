"""Limits on connections: their number, size of headers, and how long a client may keep the server waiting."""

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

MAX_CONNECTIONS = 512  # unless the system allows fewer
HEADER_BYTES = 64 << 10  # request line and headers
HEADER_SECONDS = 15.0  # from connecting, or the preceding answer, to the last byte of the headers
UNTAKEN_SECONDS = 5.0  # after which an untaken answer may be dropped for a new connection
_LEAST_PART = 32  # least average bytes per part of a body with more than _FREE_PARTS parts: each costs a turn
_FREE_PARTS = 1024
_BACKLOG = 128  # connections accepted in one go
_SPARE_FILES = 24  # file descriptors reserved for other uses


@dataclass(frozen=True)
class Room:
    """The most connections, and the most that are accepted ahead of handling."""

    connections: int
    backlog: int


def room(asked: int | None) -> Room:
    """Return limits with which accepting never fails for lack of file descriptors, which would lock out all clients.

    ``asked``: connections; None: a sensible number. Raises ArgumentError for more than the system allows.
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
    """Return the file descriptors available for connections; None if unknown."""
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


class _LimitedRequests(h11.Connection):
    """A request parser that refuses bodies of many tiny chunks."""

    _count = _bytes = 0

    def next_event(self) -> Any:
        """Return the next event. Raises h11.RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._count += 1
            self._bytes += len(event.data)
            if self._count > _FREE_PARTS + self._bytes // _LEAST_PART:
                raise h11.RemoteProtocolError("the body comes in too many small chunks", error_status_hint=413)
        elif isinstance(event, h11.Request):
            self._count = self._bytes = 0
        return event


class Connection(H11Protocol):
    """An HTTP/1.1 connection, of which at most ``most`` are open.

    To admit one more, the connection is dropped that has kept the server waiting longest for headers, body or next
    request; else the one whose answer has been untaken longest; else the new one is answered with 503.
    """

    most = MAX_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Handle a new client."""
        super().connection_made(transport)
        self._since = monotonic()
        self._late: asyncio.TimerHandle | None = None
        self._blocked: float | None = None  # since when the client has read nothing of a long answer
        self.conn = _LimitedRequests(h11.SERVER, HEADER_BYTES)
        self._watch()
        if len(self.connections) > self.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Handle received bytes."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Handle the end of an answer."""
        super().on_response_complete()
        self._since = monotonic()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle a client that left."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._watch()

    def pause_writing(self) -> None:
        """Note that the client reads too slowly."""
        super().pause_writing()
        self._blocked = monotonic()

    def resume_writing(self) -> None:
        """Note that the client has caught up."""
        super().resume_writing()
        self._blocked = None

    @property
    def untaken(self) -> float | None:
        """The time since when an answer is untaken by the client, or None."""
        if self._blocked is not None:
            return self._blocked
        done = self.cycle is not None and self.cycle.response_complete
        return self._since if done and self.transport.get_write_buffer_size() > 0 else None

    @property
    def answering(self) -> bool:
        """Whether a complete request is being answered, or an answer is not fully taken."""
        cycle = self.cycle
        asked = cycle is not None and not cycle.response_complete and (cycle.response_started or not cycle.more_body)
        return asked or self.transport.get_write_buffer_size() > 0

    def _watch(self) -> None:
        """Limit the time for headers; a body has its own limit."""
        between = (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()
        if between and self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)
        elif not between and self._late is not None:
            self._late.cancel()
            self._late = None

    def _make_room(self) -> None:
        """Drop a connection for this one, or refuse this one."""
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
    """Make the protocol class with its own limit."""
    fields: dict[str, Any] = {"most": most}
    return type("BoundedConnection", (Connection,), fields)
