"""The slots of a batch: which request runs in which, whose prompt is prefilled next, one token for all others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic, perf_counter

import numpy as np
from numpy.typing import NDArray

from ..backends.bindings import lane_window
from ..decoding.generator import TokenSequence
from ..decoding.loop_driver import Interrupted, LoopDriver
from ..decoding.next_logits import NextLogits
from ..decoding.pipeline import Advancing, PipelineCounts, cannot_pipeline, may_pipeline
from ..decoding.prefix_cache import Prefixes
from ..decoding.settings import LoopSettings
from ..errors import ArgumentError, MeltError
from ..results import Generation, TextDelta
from ..text.tokenizer import TextTokenizer
from .request import RequestHandle

_IDLE = LoopSettings(1)  # of an empty slot


@dataclass(eq=False)
class RunningRequest:
    """A request in a slot.

    ``fed``: prompt tokens in the cache, of which the first ``cached`` were restored. ``token``: the next token to run;
    None during prefill. ``over``: it ended during a step, after which its slot is freed. Times are those of
    ``monotonic``. ``in_flight``: ``token`` has been given to pipelined decoding.
    """

    handle: RequestHandle
    sequence: TokenSequence
    slot: int
    fed: int = 0
    cached: int = 0
    token: int | None = None
    started: float = field(default_factory=monotonic)
    last: float | None = None  # time of its last token
    over: bool = False
    in_flight: bool = False


StepResult = tuple[RunningRequest, TextDelta | MeltError | None]  # None: the request ended without a token
Work = dict[int, tuple[tuple[int, ...], LoopSettings]]  # new tokens by slot


class Slots:
    """A fixed number of slots over one state. The lowest free slot is filled first, to keep the used ones adjacent.

    While all running requests decode, they may be pipelined: where a LoopLM's loops have caches of their own, and for
    this number of requests that is the faster way. For that they take the first slots, and the caches of these are laid
    side by side per loop. Requests to a MELT are pipelined where they ask for it, whatever the others do, because that
    changes their tokens.

    Not thread-safe. Errors of the backend propagate; after one, only ``release`` may be called for the requests that
    were running. ``prefilled`` and ``reused`` are called with numbers of prompt tokens run and restored.
    ``between_loops`` is called between loops and may ``stop`` requests; a step ends early once none of its active
    requests is wanted.
    """

    def __init__(
        self,
        driver: LoopDriver,
        tokenizer: TextTokenizer | None,
        prefixes: Prefixes | None = None,
        prefilled: Callable[[int], None] = lambda tokens: None,
        reused: Callable[[int], None] = lambda tokens: None,
        between_loops: Callable[[], None] = lambda: None,
    ):
        if prefixes is not None:
            prefixes.claim(driver)
        self.driver, self.tokenizer, self.prefixes = driver, tokenizer, prefixes
        self.prefilled, self.reused, self._between_loops = prefilled, reused, between_loops
        self.running: dict[int, RunningRequest] = {}
        self._prefilling: deque[RunningRequest] = deque()
        self._layouts: dict[int, LoopDriver] = {driver.batch: driver}  # by number of slots side by side
        self._home = driver  # the layout of the caches now
        self.moving = False  # whether a move of the caches has begun and not ended: what they hold is then undefined
        self._parts: dict[tuple[LoopDriver, int, int], LoopDriver] = {}

    def free(self) -> int:
        """Return the number of empty slots."""
        return self.driver.batch - len(self.running)

    def admit(self, handle: RequestHandle) -> RunningRequest:
        """Put a request into the lowest free slot. Its random stream is 0 in every slot."""
        slot = next(slot for slot in range(self.driver.batch) if slot not in self.running)
        request = handle.request
        if request.options.pipeline == "on" and may_pipeline(self.driver.manifest, request.options):
            why = self._pipelined(1).state.lanes_fit()
            if why is not None:
                raise cannot_pipeline(why)
        self._lay_out(self.driver.batch)
        self.driver.clear(slot)
        sequence = TokenSequence(
            slot,
            request.prompt,
            request.options,
            self.tokenizer,
            stream=0,
            logprobs=request.logprobs,
            constraint=request.constraint,
        )
        sequence.counts = PipelineCounts(lane_window(self.driver.manifest))
        made = RunningRequest(handle, sequence, slot)
        try:
            self.running[slot] = made
            self._prefilling.append(made)
        except MemoryError:
            self.release(made)
            raise
        return made

    def release(self, running: RunningRequest) -> None:
        """Free a request's slot."""
        self.running = {slot: one for slot, one in self.running.items() if one is not running}
        self.moving = self.moving and bool(self.running)
        if running in self._prefilling:
            self._prefilling.remove(running)
        self.driver.clear(running.slot)

    def end(self, running: RunningRequest, reason: str | None = None) -> Generation:
        """End a request, by itself or for an external reason, free its slot and return its result."""
        result = self.stop(running, reason)
        self.release(running)
        return result

    def stop(self, running: RunningRequest, reason: str | None) -> Generation:
        """End a request as ``end`` does, but keep its slot until the current step ends."""
        if reason is not None:
            running.sequence.end(reason)
        running.over = True
        return running.sequence.result(self.driver.cached.depth(running.slot), running.cached)

    def prefill(self) -> list[StepResult]:
        """Run one chunk of one prompt, prompts in rotation. Its last chunk gives the first token."""
        if not self._prefilling:
            return []
        running = self._prefilling.popleft()
        request, settings = running.handle.request, running.sequence.options.loops
        prompt = request.prompt
        if self.prefixes is not None and not running.fed and request.reading is None:
            running.fed = running.cached = self.prefixes.restore(self._home, running.slot, prompt, settings)
            if running.cached:
                self.reused(running.cached)
        chunk = prompt[running.fed : running.fed + (settings.chunk or self.driver.manifest.chunk)]
        try:
            logits, first = self._advance(running.slot, 1, {running.slot: (chunk, settings)}, [running])
        except Interrupted:
            return []
        running.fed += len(chunk)
        self.prefilled(len(chunk))
        if running.over:
            return []
        if request.reading is not None:
            try:
                request.reading.read(logits, running.slot - first, running.fed - len(chunk), chunk)
            except ArgumentError as error:
                return [(running, error)]
        if running.fed < len(prompt):
            self._prefilling.append(running)
            return []
        if self.prefixes is not None:
            self.prefixes.keep(self._home, running.slot, prompt, settings)
        if request.prompt_only:
            running.sequence.end("length")
            return [(running, None)]
        return [self._sample(running, logits, first)]

    def decode(self) -> list[StepResult]:
        """Run one token of every prefilled sequence, in one batch that ends with the last of them; pipelined, one loop
        of every token in flight."""
        ready = [one for _, one in sorted(self.running.items()) if one.token is not None]
        if not ready:
            return []
        if self.driver.manifest.cache_loops is None:
            piped = [one for one in ready if may_pipeline(self.driver.manifest, one.sequence.options)]
            plain = [one for one in ready if one not in piped]
            return (self._decode_pipelined(piped) if piped else []) + (self._decode_plain(plain) if plain else [])
        if not self._may_pipeline(ready):
            return self._decode_plain(ready)
        if all(one.sequence.options.pipeline == "on" for one in ready):
            return self._decode_pipelined(ready)
        count, choice, started = len(ready), self.driver.choice, perf_counter()
        faster = choice.pipelined(count)
        results = self._decode_pipelined(ready) if faster else self._decode_plain(ready)
        choice.ran(count, faster, perf_counter() - started, len(results) if faster else count)
        return results

    def _may_pipeline(self, ready: Sequence[RunningRequest]) -> bool:
        """Return whether these requests may be pipelined: all that run, by what they ask and where their caches lie."""
        return (
            len(ready) == len(self.running)
            and all(may_pipeline(self.driver.manifest, one.sequence.options) for one in ready)
            and self._pipelined(len(ready)).pipeline is not None
        )

    def _pipelined(self, count: int) -> LoopDriver:
        """Return the driver on which ``count`` requests would be pipelined: a MELT has only one layout."""
        return self.driver if self.driver.manifest.cache_loops is None else self._layout(count)

    def _decode_pipelined(self, ready: Sequence[RunningRequest]) -> list[StepResult]:
        """Run every token in flight for one loop. Sample after those that are then in the cache."""
        self._lay_out(self._pipelined(len(ready)).batch)
        pipeline = self._home.pipeline
        assert pipeline is not None
        advancing = {}
        for one in ready:
            assert one.token is not None
            assert one.sequence.counts is not None
            if not one.in_flight:
                pipeline.begin(one.slot, one.sequence.counts)
                pipeline.feed(one.slot, one.token)
                one.in_flight = True
            advancing[one.slot] = Advancing(one.sequence.options.loops, one.sequence.draft)
        arrived = pipeline.run(advancing)
        self._between_loops()
        logits = NextLogits(self._home.state, self.driver.manifest.vocab_size)
        results = []
        for one in ready:
            if one.slot in arrived:
                one.in_flight = False
                if not one.over:
                    logits.hold(one.slot, pipeline.row(one.slot))
                    results.append(self._sample(one, logits, 0))
        return results

    def _layout(self, count: int) -> LoopDriver:
        """Return the driver of the first ``count`` slots, laid side by side."""
        if count not in self._layouts:
            self._layouts[count] = self.driver.packed(count)
        return self._layouts[count]

    def _lay_out(self, count: int) -> None:
        """Lay the caches of the first ``count`` slots side by side, after moving all running requests there."""
        if self._home.batch == count:
            return
        target = self._layout(count)
        self.moving = True
        for to, running in enumerate(sorted(self.running.values(), key=lambda one: one.slot)):
            if running.slot != to and count < self._home.batch:
                self._home.move(running.slot, to)
                running.slot = running.sequence.slot = to
        before, self._home = self._home, target
        self.running = {one.slot: one for one in self.running.values()}
        before.move_to(self._home)
        for one in self.running.values():
            one.in_flight = False
        self.moving = False

    def _decode_plain(self, ready: Sequence[RunningRequest]) -> list[StepResult]:
        """Run one token of every sequence."""
        for one in ready:
            one.in_flight = False
        work: Work = {one.slot: ((one.token,), one.sequence.options.loops) for one in ready if one.token is not None}
        try:
            logits, first = self._advance(0, ready[-1].slot + 1, work, ready)
        except Interrupted:
            return []
        return [self._sample(one, logits, first) for one in ready if not one.over]

    def _advance(
        self, first: int, count: int, work: Work, requests: Sequence[RunningRequest]
    ) -> tuple[NextLogits, int]:
        """Run new tokens by slot on a part of the batch, or on all of it where the backend has no parts.

        Return the logits and the slot of their first row. ``requests``: the requests whose tokens run. Raises
        Interrupted when all of them have ended.
        """
        home = self._home
        if (first, count) == (0, home.batch):
            part: LoopDriver | None = home
        else:
            part = self._parts.get((home, first, count)) or home.part(first, count)
        if part is None:
            part, first, count = home, 0, home.batch
        self._parts[home, first, count] = part
        idle: tuple[tuple[int, ...], LoopSettings] = ((), _IDLE)
        each = [work.get(slot, idle) for slot in range(first, first + count)]
        tokens, settings = [one[0] for one in each], [one[1] for one in each]
        return part.advance(tokens, settings, partial(self._between, first, requests)), first

    def _between(self, first: int, requests: Sequence[RunningRequest], active: NDArray[np.bool_] | None = None) -> None:
        """Call ``between_loops``. Raises Interrupted when all requests still in the loop have ended.

        ``active``: which sequences are in the loop, from slot ``first`` on (None: all).
        """
        self._between_loops()
        if all(one.over or not (active is None or active[one.slot - first]) for one in requests):
            raise Interrupted

    def _sample(self, running: RunningRequest, logits: NextLogits, first: int) -> StepResult:
        """Sample a request's next token. An error of its sampling or constraint ends only this request."""
        slot = running.slot
        try:
            delta = running.sequence.sample(logits, self.driver.room(slot), self.driver.last_depth(slot), slot - first)
        except ArgumentError as error:
            return running, error
        running.token = delta.token_id
        return running, delta
