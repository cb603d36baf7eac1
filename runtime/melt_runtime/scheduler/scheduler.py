"""Continuous batching: requests come and go while others stream, over a fixed number of slots and one state."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from time import monotonic
from types import TracebackType
from typing import Self

from ..decoding.prefix_cache import Prefixes
from ..errors import ArgumentError, BackendError, BusyError, ClosedError, MeltError
from ..loaded_model import LoadedModel
from ..results import Generation, TextDelta
from ..untrusted import whole_number
from .metrics import Meter, SchedulerMetrics
from .request import Listener, Request, RequestHandle
from .slots import RunningRequest, Slots

__all__ = ["Listener", "Request", "RequestHandle", "Scheduler", "SchedulerMetrics"]

_GRACE = 60.0  # seconds that closing waits for a loop that is being computed
_LOOK = 0.01  # seconds between two looks, in the middle of a step, at who was cancelled or is late


class Scheduler:
    """Runs requests over fixed slots that share one state; all memory is allocated when it opens::

        with Scheduler(runtime) as scheduler:
            handle = scheduler.submit(Request(tuple(runtime.encode("2+2=")), runtime.options()))
            for delta in handle:
                print(delta.text, end="")

    One thread works. Each turn it prefills one chunk of one prompt, prompts in turn, and then decodes one token of
    every sequence whose prompt is through, so that a long prompt holds nobody up for longer than a chunk. Requests are
    admitted in the order they came, and each gives what it gives alone: to the last bit on the CPU in fp32 and the
    onnxruntime dialect, elsewhere as far as kernels round alike for batches and attention lengths of any size. slots:
    None takes as many as the backend can; max_waiting: how many may wait when all slots are taken; prefixes: beginnings
    of prompts that need not run again.
    A scheduler holds its thread and its memory until it is closed, at the latest when the program ends. Raises
    ArgumentError, BackendError.
    """

    def __init__(
        self, runtime: LoadedModel, slots: int | None = None, max_waiting: int = 64, prefixes: Prefixes | None = None
    ):
        if slots is not None:
            whole_number("slots", slots)
        if isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or max_waiting < 0:
            raise ArgumentError(f"max_waiting is {max_waiting!r}; it must be a whole number from 0")
        self.runtime, self.max_waiting = runtime, max_waiting
        self._meter = Meter()
        driver = runtime.driver(runtime.backend.max_batch if slots is None else slots)
        self.slots, self._state_bytes = driver.batch, driver.state.state_bytes
        self._weights_bytes = runtime.manifest.weights_bytes
        self._prefixes = prefixes
        self._slots = Slots(driver, runtime.codec, prefixes, self._meter.prefilled, self._meter.reused, self._look)
        self._moved: float | None = None  # when the thread last moved on; None: there is nothing to do
        self._looked = 0.0
        self._changed = threading.Condition()  # guards what follows, and what is waiting
        self._waiting: deque[RequestHandle] = deque()
        self._closing = self._stopping = False  # no new requests; and none of the old ones either
        self._left = False  # the thread did not come back, and nobody waits for it any more
        self._thread = threading.Thread(target=self._work, name="melt-scheduler", daemon=True)
        self._thread.start()
        atexit.register(self._exit)

    def submit(self, request: Request, listener: Listener | None = None) -> RequestHandle:
        """Hands a request in. Raises PromptError, ArgumentError, BusyError when the queue is full, ClosedError.

        listener: called from the scheduler's thread with every TextDelta, and last with the Generation (finish_reason
        "stop", "length", "cancelled" or "deadline") or the MeltError that ended it; it must not block. An exception in
        it ends this request alone.
        """
        request.check(self.runtime.manifest, self.runtime.codec is not None)
        handle = RequestHandle(request, listener, self._wake)
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise ClosedError("the scheduler is closed; it takes no more requests")
            waiting = len(self._waiting)
            if waiting >= self.max_waiting + self._slots.free():
                self._meter.ended("refused")
                seconds = self._meter.retry_after(waiting + 1, self.slots)
                raise BusyError(
                    f"all {self.slots} slots are taken and {waiting} requests wait; try again in {seconds:.1f} seconds",
                    seconds,
                )
            self._waiting.append(handle)
            self._changed.notify_all()
        return handle

    @property
    def open(self) -> bool:
        """Whether it takes requests."""
        with self._changed:
            return not self._closing and self._thread.is_alive()

    @property
    def still(self) -> float:
        """Seconds for which the thread has been at one loop, or whatever else it does between two; 0 while there is
        nothing to do."""
        moved = self._moved
        return 0.0 if moved is None else max(monotonic() - moved, 0.0)

    def metrics(self) -> SchedulerMetrics:
        """A snapshot of what was counted."""
        with self._changed:
            waiting, running = len(self._waiting), len(self._slots.running)
        kept = 0 if self._prefixes is None else self._prefixes.bytes
        return self._meter.snapshot(waiting, running, self.slots, self._state_bytes, self._weights_bytes, kept)

    def close(self, drain: bool = True, timeout: float | None = None, grace: float = _GRACE) -> bool:
        """Takes no more requests and ends: those that it has run to their end (drain) or are cancelled.

        After ``timeout`` seconds of draining the rest is cancelled. Afterwards every handle is over. A listener may
        call this too, and does not wait. If the backend does not come back from a loop within ``grace`` seconds of
        being asked to stop, the handles end with a BackendError and its thread is left behind. Returns whether the
        thread has ended.
        """
        with self._changed:
            self._closing = True
            self._stopping = self._stopping or not drain
            self._changed.notify_all()
        atexit.unregister(self._exit)
        if threading.current_thread() is self._thread:
            return False
        if drain:
            self._thread.join(timeout)
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
        if not self._left:
            self._thread.join(grace)
        if self._thread.is_alive() and not self._left:
            self._left = True
            self._abandon(BackendError(f"the backend did not come back from a loop within {grace:g} seconds"))
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def _exit(self) -> None:
        """The program ends and nobody closed: a thread inside a backend would bring it down."""
        self.close(drain=False)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        """The scheduler's thread, until it is closed. Whatever happens, no handle stays open."""
        try:
            while self._awake():
                self._turn()
            self._abandon(ClosedError("the scheduler was closed"))
        except BaseException as error:
            self._abandon(_as_melt(error))
        finally:
            self._slots.running.clear()

    def _awake(self) -> bool:
        """Waits until there is something to do; False when all is done and the scheduler is closing."""
        with self._changed:
            while not (self._waiting or self._slots.running):
                self._moved = None
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _turn(self) -> None:
        """Who must end ends, who waits is admitted; then a chunk of a prompt, and a token of everybody."""
        for step in (self._slots.prefill, self._slots.decode):
            self._moved = self._looked = monotonic()
            self._sweep()
            self._admit()
            try:
                drawn = step()
            except Exception as error:
                self._fail_running(_as_melt(error))
                return
            for running, what in drawn:
                self._deliver(running, what)
            self._release_over()

    def _look(self) -> None:
        """Called between two loops: who must end ends here; the slot stays taken until the step is over."""
        now = self._moved = monotonic()
        if now - self._looked >= _LOOK:
            self._looked = now
            self._sweep(in_step=True)

    def _release_over(self) -> None:
        """Empties the slots of those that ended in the middle of a step."""
        for running in [one for one in self._slots.running.values() if one.over]:
            with self._changed:
                self._slots.release(running)

    def _sweep(self, in_step: bool = False) -> None:
        """Ends requests that were cancelled or whose time is over, whether they wait or run."""
        now = monotonic()
        with self._changed:
            stopping = self._stopping
            over = [(one, "cancelled" if stopping else one.reason(now)) for one in self._waiting]
            self._waiting = deque(handle for handle, reason in over if reason is None)
        for handle, reason in over:
            if reason is not None:
                self._meter.ended(reason)
                request = handle.request
                handle.finish(Generation("", (), reason, len(request.prompt), (), request.options.loops.loops))
        for running in list(self._slots.running.values()):
            reason = "cancelled" if stopping else running.handle.reason(now)
            if reason is not None and not running.over:
                self._finish(running, reason, in_step)

    def _admit(self) -> None:
        """First come, first served."""
        while True:
            with self._changed:
                if not self._waiting or not self._slots.free():
                    return
                handle = self._waiting.popleft()
                try:
                    self._slots.admit(handle)
                    continue
                except Exception as error:
                    failure = _as_melt(error)
            self._meter.ended("failed")
            handle.fail(failure)

    def _deliver(self, running: RunningRequest, what: TextDelta | MeltError) -> None:
        """A token came of a sequence, or an error of its own."""
        if isinstance(what, MeltError):
            self._fail(running, what)
            return
        now, before = monotonic(), running.last
        running.last = now
        self._meter.sampled(what.depth, now - (running.handle.submitted if before is None else before), before is None)
        try:
            running.handle.hand(what)
        except Exception as error:
            failure = MeltError(f"the request's listener failed: {error!r}")
            failure.__cause__ = error
            self._fail(running, failure, tell=False)
            return
        if what.finish_reason is not None:
            self._finish(running)

    def _finish(self, running: RunningRequest, reason: str | None = None, in_step: bool = False) -> None:
        with self._changed:
            result = (self._slots.stop if in_step else self._slots.end)(running, reason)
        self._meter.ended(result.finish_reason, monotonic() - running.started)
        running.handle.finish(result)

    def _fail(self, running: RunningRequest, error: MeltError, tell: bool = True) -> None:
        with self._changed:
            self._slots.release(running)
        self._meter.ended("failed", monotonic() - running.started)
        running.handle.fail(error, tell)

    def _fail_running(self, error: MeltError) -> None:
        """A step failed: what the state holds is worth nothing, so all that runs ends. What waits may yet run."""
        self._release_over()
        for running in list(self._slots.running.values()):
            self._fail(running, error)

    def _abandon(self, error: MeltError) -> None:
        """Ends every handle there is, from whatever thread; the scheduler is over."""
        with self._changed:
            self._closing = self._stopping = True
            handles = [*self._waiting, *(one.handle for one in self._slots.running.values())]
            self._waiting.clear()
        for handle in handles:
            if not handle.done:
                self._meter.ended("failed")
            handle.fail(error)


def _as_melt(error: BaseException) -> MeltError:
    """An error of the family, as it is or wrapped."""
    if isinstance(error, MeltError):
        return error
    failure = BackendError(f"a step of the scheduler failed: {error!r}")
    failure.__cause__ = error
    return failure
