"""The states behind a Runtime's own calls: one is reused from call to call, more are opened while it is in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..errors import BackendError, OvertakenError
from .loop_driver import LoopDriver

T = TypeVar("T")


class StatePool:
    """A pool that lends each call its own state, from any thread.

    Without memory for another state, a call takes the one of the stream that was read longest ago, which then raises
    OvertakenError; a call that is computing is waited for. ``open_driver``: allocates a state for a batch.
    """

    def __init__(self, open_driver: Callable[[int], LoopDriver]):
        self._open = open_driver
        self._idle: LoopDriver | None = None
        self._leases: list[Lease] = []  # least recently used first
        # Reentrant: the garbage collector may end an abandoned stream's lease at any time.
        self._changed = threading.Condition(threading.RLock())

    @contextmanager
    def lease(self, batch: int) -> Iterator[Lease]:
        """Lend an empty state of ``batch`` sequences for the length of the block. Raises BackendError."""
        lease = self._take(batch)
        try:
            yield lease
        finally:
            self._end(lease)

    def steps(self, batch: int, begin: Callable[[LoopDriver], Iterator[T]]) -> Iterator[T]:
        """Yield the items that ``begin`` produces on an empty state. Raises BackendError, OvertakenError."""
        with self.lease(batch) as lease:
            yield from lease.steps(begin)

    def _take(self, batch: int) -> Lease:
        with self._changed:
            while True:
                driver, self._idle = self._idle, None
                if driver is None or driver.batch != batch:
                    driver = None  # frees the old state before the new one is allocated
                    try:
                        driver = self._open(batch)
                    except BackendError:
                        if not self._leases:
                            raise
                if driver is not None:
                    driver.reset()
                    lease = Lease(self, driver)
                    self._leases.append(lease)
                    return lease
                self._make_room()

    def _make_room(self) -> None:
        """End a lease: at once if it is between steps, else after its step."""
        leases = list(self._leases)
        paused = next((lease for lease in leases if not lease.running), None)
        if paused is not None:
            self._end(paused)
        elif leases:
            leases[0].wanted = True
            self._changed.wait()

    def _begin_step(self, lease: Lease) -> None:
        with self._changed:
            if lease.driver is None:
                raise OvertakenError("another call needed this stream's memory and has taken it; begin another stream")
            lease.running = True
            self._leases = [*(one for one in self._leases if one is not lease), lease]

    def _end_step(self, lease: Lease) -> None:
        with self._changed:
            lease.running = False
            if lease.wanted:
                self._end(lease)

    def _end(self, lease: Lease) -> None:
        with self._changed:
            if lease.driver is None:
                return
            self._leases = [one for one in self._leases if one is not lease]
            # The caller may keep the stream, which must not keep the state's memory alive.
            self._idle, lease.driver, lease.work = lease.driver, None, None
            self._changed.notify_all()


class Lease:
    """A state lent to one call. ``running``: it is computing; ``wanted``: another call waits for it."""

    def __init__(self, states: StatePool, driver: LoopDriver):
        self._states = states
        self.driver: LoopDriver | None = driver
        self.work: Iterator[object] | None = None
        self.running = self.wanted = False

    @contextmanager
    def step(self) -> Iterator[LoopDriver]:
        """Hold the state for the length of the block. Raises OvertakenError if another call has taken it."""
        self._states._begin_step(self)
        try:
            assert self.driver is not None
            yield self.driver
        finally:
            self._states._end_step(self)

    def steps(self, begin: Callable[[LoopDriver], Iterator[T]]) -> Iterator[T]:
        """Yield the items that ``begin`` produces on the state, one per step. Raises OvertakenError."""
        while True:
            self._states._begin_step(self)
            try:
                if self.work is None:
                    assert self.driver is not None
                    self.work = begin(self.driver)
                item: T = next(self.work)  # type: ignore[assignment]
            except StopIteration:
                return
            finally:
                self._states._end_step(self)
            yield item
