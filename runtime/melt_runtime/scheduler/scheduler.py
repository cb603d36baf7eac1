"""Continuous batching: requests join and leave while others stream, over fixed slots and one state."""

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

_GRACE = 60.0  # seconds that ``close`` waits for a running loop
_SWEEP_SECONDS = 0.01  # least seconds between checks for cancelled and late requests during a step


class Scheduler:
    """A thread that runs requests over fixed slots sharing one state, allocated when it opens::

        with Scheduler(runtime) as scheduler:
            handle = scheduler.submit(Request(tuple(runtime.encode("2+2=")), runtime.options()))
            for delta in handle:
                print(delta.text, end="")

    Each turn prefills one chunk of one prompt, prompts in rotation, and then decodes one token of every prefilled
    sequence, so a long prompt delays the others by one chunk at most. Requests are admitted in order of submission.
    Each gets the result that it would get alone: bit for bit on the CPU in fp32 and the onnxruntime dialect, elsewhere
    as far as kernels round alike at every batch size and attention length.

    ``slots``: None takes as many as the backend allows. ``max_waiting``: the most requests that wait when all slots are
    taken. ``prefixes``: a store of prompt beginnings that need not run again. The thread and the memory are held until
    ``close``, or until the program ends. Raises ArgumentError, BackendError.
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
        self._slots = Slots(
            driver, runtime.tokenizer, prefixes, self._meter.prefilled, self._meter.reused, self._between_loops
        )
        self._moved: float | None = None  # time of the last loop or step; None: nothing to do
        self._swept = 0.0
        self._changed = threading.Condition()  # guards the fields below
        self._waiting: deque[RequestHandle] = deque()
        self._closing = self._stopping = False  # refuses new requests; ends running ones
        self._left = False  # the thread hangs in the backend and was given up
        self._thread = threading.Thread(target=self._work, name="melt-scheduler", daemon=True)
        self._thread.start()
        atexit.register(self._exit)

    def submit(self, request: Request, listener: Listener | None = None) -> RequestHandle:
        """Queue a request. Raises PromptError, ArgumentError, BusyError if the queue is full, ClosedError.

        ``listener``: called from the scheduler's thread with every TextDelta, and last with the Generation
        (finish_reason "stop", "length", "cancelled" or "deadline") or the MeltError that ended the request. It must not
        block. An exception in it ends only this request.
        """
        request.check(self.runtime.manifest, self.runtime.tokenizer is not None)
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
        """Whether the scheduler takes requests."""
        with self._changed:
            return not self._closing and self._thread.is_alive()

    @property
    def stalled(self) -> float:
        """The seconds since the last loop or step; 0 if there is nothing to do."""
        moved = self._moved
        return 0.0 if moved is None else max(monotonic() - moved, 0.0)

    def metrics(self) -> SchedulerMetrics:
        """Return a snapshot of the counters."""
        with self._changed:
            waiting, running = len(self._waiting), len(self._slots.running)
        kept = 0 if self._prefixes is None else self._prefixes.bytes
        return self._meter.snapshot(waiting, running, self.slots, self._state_bytes, self._weights_bytes, kept)

    def close(self, drain: bool = True, timeout: float | None = None, grace: float = _GRACE) -> bool:
        """Refuse new requests and end the others: at their own end (``drain``), or cancelled. Return whether the thread
        ended.

        ``timeout``: seconds of draining, after which the rest is cancelled. ``grace``: seconds to wait for a loop that
        the backend does not finish; then the handles end with BackendError and the thread is left behind. Afterwards
        every handle has ended. A call from a listener does not wait.
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
        """Close at the end of the program: a thread inside a backend would crash the interpreter's shutdown."""
        self.close(drain=False)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        """Run the thread until the scheduler is closed. Every handle ends, whatever happens."""
        try:
            while self._awake():
                self._turn()
            self._abandon(ClosedError("the scheduler was closed"))
        except BaseException as error:
            self._abandon(_as_melt(error))
        finally:
            self._slots.running.clear()

    def _awake(self) -> bool:
        """Wait for requests. Return False if there are none and the scheduler is closing."""
        with self._changed:
            while not (self._waiting or self._slots.running):
                self._moved = None
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _turn(self) -> None:
        """Run a chunk of one prompt, then a token of every prefilled sequence. Before each, end and admit requests."""
        for step in (self._slots.prefill, self._slots.decode):
            self._moved = self._swept = monotonic()
            self._sweep()
            self._admit()
            try:
                results = step()
            except Exception as error:
                self._fail_running(_as_melt(error))
                return
            for running, result in results:
                self._deliver(running, result)
            self._release_over()

    def _between_loops(self) -> None:
        """End cancelled and late requests between loops; their slots stay taken until the step ends."""
        now = self._moved = monotonic()
        if now - self._swept >= _SWEEP_SECONDS:
            self._swept = now
            self._sweep(in_step=True)

    def _release_over(self) -> None:
        """Free the slots of requests that ended during a step."""
        for running in [one for one in self._slots.running.values() if one.over]:
            with self._changed:
                self._slots.release(running)

    def _sweep(self, in_step: bool = False) -> None:
        """End waiting and running requests that were cancelled or are past their deadline."""
        now = monotonic()
        with self._changed:
            stopping = self._stopping
            over = [(one, "cancelled" if stopping else one.reason(now)) for one in self._waiting]
            self._waiting = deque(handle for handle, reason in over if reason is None)
        for handle, reason in over:
            if reason is not None:
                self._meter.ended(reason, whole=now - handle.submitted)
                request = handle.request
                handle.finish(Generation("", (), reason, len(request.prompt), (), request.options.loops.loops))
        for running in list(self._slots.running.values()):
            reason = "cancelled" if stopping else running.handle.reason(now)
            if reason is not None and not running.over:
                self._finish(running, reason, in_step)

    def _admit(self) -> None:
        """Give free slots to waiting requests, in order of submission."""
        while True:
            with self._changed:
                if not self._waiting or not self._slots.free():
                    return
                handle = self._waiting.popleft()
                try:
                    self._slots.admit(handle)
                    self._meter.admitted(monotonic() - handle.submitted)
                    continue
                except Exception as error:
                    failure = _as_melt(error)
            self._meter.ended("failed", whole=monotonic() - handle.submitted)
            handle.fail(failure)
            if self._slots.moving:
                self._fail_running(failure)

    def _deliver(self, running: RunningRequest, result: TextDelta | MeltError | None) -> None:
        """Pass on a sampled token, or fail the request, or end one that samples none."""
        if isinstance(result, MeltError):
            self._fail(running, result)
            return
        if result is None:
            self._finish(running)
            return
        now, before = monotonic(), running.last
        running.last = now
        self._meter.sampled(
            result.depth, now - (running.handle.submitted if before is None else before), before is None
        )
        try:
            running.handle.deliver(result)
        except Exception as error:
            failure = MeltError(f"the request's listener failed: {error!r}")
            failure.__cause__ = error
            self._fail(running, failure, tell=False)
            return
        if result.finish_reason is not None:
            self._finish(running)

    def _finish(self, running: RunningRequest, reason: str | None = None, in_step: bool = False) -> None:
        with self._changed:
            result = (self._slots.stop if in_step else self._slots.end)(running, reason)
        now = monotonic()
        self._meter.ended(result.finish_reason, now - running.started, now - running.handle.submitted)
        self._meter.pipelined(result.pipeline)
        running.handle.finish(result)

    def _fail(self, running: RunningRequest, error: MeltError, tell: bool = True) -> None:
        with self._changed:
            self._slots.release(running)
        now = monotonic()
        self._meter.ended("failed", now - running.started, now - running.handle.submitted)
        self._meter.pipelined(running.sequence.pipeline_use)
        running.handle.fail(error, tell)

    def _fail_running(self, error: MeltError) -> None:
        """Fail all running requests after a failed step, because the state is undefined. Waiting requests stay
        queued."""
        self._release_over()
        for running in list(self._slots.running.values()):
            self._fail(running, error)

    def _abandon(self, error: MeltError) -> None:
        """End every handle with an error and close the scheduler. Callable from any thread."""
        with self._changed:
            self._closing = self._stopping = True
            running = list(self._slots.running.values())
            handles = [*self._waiting, *(one.handle for one in running)]
            self._waiting.clear()
        for one in running:
            if not one.handle.done:
                self._meter.pipelined(one.sequence.pipeline_use)
        for handle in handles:
            if not handle.done:
                self._meter.ended("failed", whole=monotonic() - handle.submitted)
            handle.fail(error)


def _as_melt(error: BaseException) -> MeltError:
    """Return the error if it is a MeltError, else wrap it."""
    if isinstance(error, MeltError):
        return error
    failure = BackendError(f"a step of the scheduler failed: {error!r}")
    failure.__cause__ = error
    return failure
