"""Pass events from the scheduler's thread to the event loop and to clients that may be slow or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from ..errors import MeltError
from ..results import Generation, TextDelta
from ..scheduler.request import Request
from ..scheduler.scheduler import Scheduler

Event = TextDelta | Generation | MeltError
SendEvent = Callable[..., Awaitable[None]]


class Backlog:
    """The unread events of all feeds, at most ``most``. Beyond that, the feed furthest behind is cut. For the event
    loop's thread."""

    def __init__(self, most: int):
        self.most, self.unread = most, 0
        self.feeds: set[Feed] = set()

    def add(self, feed: Feed) -> None:
        """Count a new event of a feed."""
        self.feeds.add(feed)
        feed.unread += 1
        self.unread += 1
        if self.unread > self.most:
            max(self.feeds, key=lambda one: one.unread).cut()

    def take(self, feed: Feed, count: int = 1) -> None:
        """Uncount events that were read or dropped."""
        feed.unread -= count
        self.unread -= count
        if not feed.unread:
            self.feeds.discard(feed)


class Feed:
    """The events of several requests in order of arrival, each with its request's index.

    The scheduler never waits for a reader: events are queued and count in the backlog. Create it in the event loop.
    Raises what ``Scheduler.submit`` raises; then none of the requests runs.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request], backlog: Backlog):
        self.unread, self._backlog, self._closed = 0, backlog, False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open = len(requests)
        self._handles = []
        try:
            for index, request in enumerate(requests):
                self._handles.append(scheduler.submit(request, partial(self._receive_event, index)))
        except BaseException:
            self.close()
            raise

    def _receive_event(self, index: int, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._put, index, event)

    def _put(self, index: int, event: Event) -> None:
        if not self._closed:
            self._events.put_nowait((index, event))
            self._backlog.add(self)

    def cut(self) -> None:
        """End the feed because its reader is too far behind; unread events are dropped."""
        behind = self.unread
        self.close()
        error = MeltError(f"the client is {behind} tokens behind; this server keeps {self._backlog.most} for all")
        self._events.put_nowait((0, error))

    def close(self) -> None:
        """Cancel all requests and drop unread events."""
        self._closed = True
        self.cancel()
        self._backlog.take(self, self.unread)
        while not self._events.empty():
            self._events.get_nowait()

    def cancel(self) -> None:
        """Cancel the running requests, each at its next loop or token."""
        for handle in self._handles:
            if not handle.done:
                handle.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self._open:
            index, event = await self._events.get()
            if not self._closed:
                self._backlog.take(self)
            self._open -= not isinstance(event, TextDelta)
            yield index, event

    @asynccontextmanager
    async def for_client(self, receive: Receive) -> AsyncIterator[None]:
        """Cancel all requests once the client is gone or the block is left."""
        watch = asyncio.create_task(_gone(receive))
        watch.add_done_callback(lambda task: self.cancel())
        try:
            yield
        finally:
            watch.cancel()
            self.close()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events. ``messages``: called with a function that sends one event, by its content and
    its name, if it has one; returns at the end."""

    media_type = "text/event-stream"

    def __init__(self, feed: Feed, messages: Callable[[SendEvent], Awaitable[None]]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._feed, self._messages = feed, messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""

        async def send_event(message: Any, name: str | None = None) -> None:
            text = message if isinstance(message, str) else json.dumps(message, separators=(",", ":"))
            head = "" if name is None else f"event: {name}\n"
            await send({"type": "http.response.body", "body": f"{head}data: {text}\n\n".encode(), "more_body": True})

        async with self._feed.for_client(receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._messages(send_event)
            await send({"type": "http.response.body", "body": b""})
