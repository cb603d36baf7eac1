"""The end of a server: it answers while running requests end, and exits in time whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from time import monotonic
from types import FrameType

import uvicorn
from starlette.concurrency import run_in_threadpool

from ..scheduler.scheduler import Scheduler
from .connection import Connection

GRACE = 0.3  # seconds for a cut request to leave its loop, and then to send its last event
_LAST_RESORT = 0.9  # seconds after the drain at which the process is ended by force


class DrainingServer(uvicorn.Server):
    """A server that ends gracefully on SIGTERM or SIGINT.

    At the first signal it refuses new requests, reports that at /ready, and gives running ones ``drain`` seconds to
    end; then it cuts them with an error. A second signal cuts them at once. The process exits at most a second after
    the drain, even if the model or the event loop hangs.
    """

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, drain: float):
        super().__init__(config)
        self._scheduler, self._drain = scheduler, drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._signalled = False

    def take_signals(self) -> None:
        """Handle signals from now on: one before the event loop runs ends the server, one after it changes nothing."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal, in the main thread."""
        if self._loop is None or self._loop.is_closed():
            self.should_exit = True
        elif not self._signalled:
            self._signalled = True
            self._end_within(self._drain + _LAST_RESORT)
            self._loop.call_soon_threadsafe(self._begin)
        else:
            self._drain = 0.0
            self._end_within(_LAST_RESORT)
            threading.Thread(target=self._scheduler.close, args=(False,), daemon=True).start()

    def _end_within(self, seconds: float) -> None:
        last = threading.Timer(seconds, os._exit, (0,))
        last.daemon = True
        last.start()

    def _begin(self) -> None:
        self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        due = monotonic() + self._drain
        await run_in_threadpool(self._scheduler.close, True, self._drain, GRACE)
        told = monotonic() + GRACE
        while self._answering() and monotonic() < max(min(due, monotonic() + self._drain), told):
            await asyncio.sleep(0.02)
        for connection in list(self.server_state.connections):
            cycle = connection.cycle if isinstance(connection, Connection) else None
            if cycle is not None and not cycle.response_complete:  # a client that sends no body or takes no answer
                connection.transport.abort()
        self.should_exit = True

    def _answering(self) -> list[Connection]:
        return [one for one in self.server_state.connections if isinstance(one, Connection) and one.answering]
