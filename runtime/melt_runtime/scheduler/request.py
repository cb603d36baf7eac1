"""A request to a scheduler, and its handle: a stream of deltas that always ends."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING

from ..decoding.generator import check_request
from ..decoding.prompt_reading import PromptReading
from ..decoding.settings import GenerationOptions
from ..errors import ArgumentError, CancelledError, DeadlineError, MeltError, PromptError
from ..package.manifest import Manifest
from ..results import Generation, TextDelta
from ..sampling.constraint import Constraint
from ..text.prompts import token_ids

if TYPE_CHECKING:
    import asyncio

Listener = Callable[[TextDelta | Generation | MeltError], None]


@dataclass(frozen=True)
class Request:
    """A prompt to continue, as token ids. Raises PromptError for anything else.

    ``deadline``: seconds from submission to the end. ``logprobs``: how many of the likeliest tokens each delta reports
    (0: only the sampled token's logprob; None: none). ``constraint``: restricts the tokens; not shared with other
    requests. ``reading``: reads the prompt as it runs, complete before the first delta; not shared either.
    ``prompt_only``: end after the prompt, with finish_reason "length" and no token.
    """

    prompt: tuple[int, ...]
    options: GenerationOptions
    deadline: float | None = None
    logprobs: int | None = None
    constraint: Constraint | None = None
    reading: PromptReading | None = None
    prompt_only: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            raise PromptError("a request's prompt is token ids, and this one is text; give Runtime.encode(prompt)")
        object.__setattr__(self, "prompt", tuple(token_ids(self.prompt)))

    def check(self, manifest: Manifest, has_tokenizer: bool) -> None:
        """Raise PromptError or ArgumentError for a request that this package cannot run."""
        if not isinstance(self.options, GenerationOptions):
            raise ArgumentError("a request's options must be GenerationOptions, as Runtime.options makes them")
        check_request([self.prompt], [manifest.max_seq_len], manifest, self.options, has_tokenizer)
        self.options.loops.check(manifest)
        limit = self.deadline
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float)):
            raise ArgumentError(f"deadline is {limit!r}; it must be a number of seconds")
        if limit is not None and not 0 < limit < math.inf:
            raise ArgumentError(f"deadline is {limit!r}; it must be a finite number of seconds above 0")
        count = self.logprobs
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            raise ArgumentError(f"logprobs is {count!r}; it must be a whole number from 0, or None")


class RequestHandle:
    """A submitted request. Iterate it for its deltas; with several iterators, each delta goes to one of them.

    It always ends, with a Generation or with an error. In a coroutine, ``async for`` gives the deltas and
    ``await handle.aresult()`` the Generation; both cancel the request if they are left before its end.
    """

    def __init__(self, request: Request, listener: Listener | None, wake: Callable[[], None]):
        self.request = request
        self.submitted = monotonic()
        self.due = None if request.deadline is None else self.submitted + request.deadline
        self.cancelled = False
        self._listener, self._wake = listener, wake
        self._deltas: SimpleQueue[TextDelta | None] = SimpleQueue()  # None: the end
        self._watchers: list[Callable[[], object]] = []  # called after each delta and at the end
        self._lock, self._over = threading.Lock(), threading.Event()
        self._outcome: Generation | MeltError | None = None

    def cancel(self) -> None:
        """End the request after its current loop or token. No effect if it has ended."""
        self.cancelled = True
        self._wake()

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._over.is_set()

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the end and return the Generation.

        Raises the error that ended the request: CancelledError or DeadlineError, which hold the partial result, or
        another MeltError. Raises TimeoutError after ``timeout`` seconds; the request goes on.
        """
        if not self._over.wait(timeout):
            raise TimeoutError(f"the request is not over after {timeout} seconds")
        outcome = self._outcome
        if isinstance(outcome, Generation):
            return outcome
        assert outcome is not None
        raise outcome

    def __iter__(self) -> Iterator[TextDelta]:
        """Yield deltas as they come. Stop silently after ``cancel``; raise any other error that ended the request."""
        while (delta := self._deltas.get()) is not None:
            yield delta
        self._deltas.put(None)  # for other iterators
        if isinstance(self._outcome, MeltError) and not self.cancelled:
            raise self._outcome

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        """Yield deltas as iterating does, without blocking the event loop."""
        with self._watching() as changed:
            while True:
                changed.clear()
                try:
                    delta = self._deltas.get_nowait()
                except Empty:
                    await changed.wait()
                    continue
                if delta is None:
                    break
                yield delta
        self._deltas.put(None)  # for other iterators
        if isinstance(self._outcome, MeltError) and not self.cancelled:
            raise self._outcome

    async def aresult(self) -> Generation:
        """Wait for the end as ``result`` does, without blocking the event loop."""
        with self._watching() as changed:
            while not self.done:
                await changed.wait()
                changed.clear()
        return self.result()

    @contextmanager
    def _watching(self) -> Iterator[asyncio.Event]:
        """Set an event after each delta and at the end. Leaving the block before the end cancels the request."""
        import asyncio  # large, and most programs do without it

        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with suppress(RuntimeError):  # the loop may be closed
                loop.call_soon_threadsafe(changed.set)

        self._watchers.append(notify)
        try:
            yield changed
        finally:
            self._watchers.remove(notify)
            if not self.done:
                self.cancel()

    def reason(self, now: float) -> str | None:
        """Return why the request must end now: "cancelled", "deadline" or None."""
        if self.cancelled:
            return "cancelled"
        return "deadline" if self.due is not None and now >= self.due else None

    def deliver(self, delta: TextDelta) -> None:
        """Pass a delta to iterators and listener. Raises whatever the listener raises."""
        if self.done:
            return
        self._deltas.put(delta)
        self._notify()
        listener = self._listener
        if listener is not None:
            listener(delta)

    def finish(self, result: Generation) -> None:
        """End the request with a result. The listener gets the Generation; ``result`` raises if it was cut short."""
        error = None
        if result.finish_reason == "cancelled":
            error = CancelledError("the request was cancelled", result)
        elif result.finish_reason == "deadline":
            error = DeadlineError(f"the request was not over within {self.request.deadline} seconds", result)
        self._end(error or result, result)

    def fail(self, error: MeltError, tell: bool = True) -> None:
        """End the request with an error. ``tell``: whether to call the listener."""
        self._end(error, error if tell else None)

    def _end(self, outcome: Generation | MeltError, event: Generation | MeltError | None) -> None:
        with self._lock:  # the first end counts
            if self._outcome is not None:
                return
            self._outcome = outcome
        # A listener may refer to the handle; breaking the cycle frees both, and the request's text, at once.
        listener, self._listener = self._listener, None
        try:
            if listener is not None and event is not None:
                listener(event)
        except Exception:  # the request has already ended
            pass
        finally:
            self._over.set()
            self._deltas.put(None)
            self._notify()

    def _notify(self) -> None:
        for watcher in list(self._watchers) if self._watchers else ():
            watcher()
