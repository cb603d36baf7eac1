"""The slots of a batch and the sequences in them: who is prefilled next, and one token for all who decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from ..decoding.generator import TokenSequence
from ..decoding.loop_driver import Interrupted, LoopDriver, NextLogits
from ..decoding.prefix_cache import Prefixes
from ..decoding.settings import LoopSettings
from ..errors import ArgumentError, MeltError
from ..results import Generation, TextDelta
from ..text.tokenizer import TextCodec
from .request import RequestHandle

_IDLE = LoopSettings(1)  # of a slot that runs nothing


@dataclass(eq=False)
class RunningRequest:
    """A sequence in a slot: prefilled as far as ``fed`` tokens of its prompt, of which the first ``known`` were put
    back; ``token`` is the one to run next, None while the prompt is not through. ``over``: it ended in the middle of a
    step, after which its slot is emptied. Times are ``monotonic``'s."""

    handle: RequestHandle
    sequence: TokenSequence
    slot: int
    fed: int = 0
    known: int = 0
    token: int | None = None
    started: float = field(default_factory=monotonic)
    last: float | None = None  # when its last token came
    over: bool = False


Sampled = tuple[RunningRequest, TextDelta | MeltError]
Work = dict[int, tuple[tuple[int, ...], LoopSettings]]  # new tokens by slot


class Slots:
    """Fixed slots over one state. The lowest free one is filled first, so that those in use lie together.

    Not for several threads. What a backend raises goes through; afterwards only ``release`` may be called for the
    sequences that were there. ``prefilled`` hears how many prompt tokens ran, ``reused`` how many did not need to.
    ``look`` is called between two loops and may end sequences there (``stop``): a step goes on for as long as somebody
    who is still in its loops wants its token.
    """

    def __init__(
        self,
        driver: LoopDriver,
        codec: TextCodec | None,
        prefixes: Prefixes | None = None,
        prefilled: Callable[[int], None] = lambda tokens: None,
        reused: Callable[[int], None] = lambda tokens: None,
        look: Callable[[], None] = lambda: None,
    ):
        if prefixes is not None:
            prefixes.claim(driver)
        self.driver, self.codec, self.prefixes = driver, codec, prefixes
        self.prefilled, self.reused, self._look = prefilled, reused, look
        self.running: dict[int, RunningRequest] = {}
        self._prefilling: deque[RunningRequest] = deque()
        self._parts: dict[tuple[int, int], LoopDriver] = {(0, driver.batch): driver}

    def free(self) -> int:
        """How many slots are empty."""
        return self.driver.batch - len(self.running)

    def admit(self, handle: RequestHandle) -> RunningRequest:
        """Puts a request into the lowest free slot. Its random stream is the first, whatever the slot."""
        slot = next(slot for slot in range(self.driver.batch) if slot not in self.running)
        self.driver.clear(slot)
        request = handle.request
        sequence = TokenSequence(
            slot,
            request.prompt,
            request.options,
            self.codec,
            stream=0,
            logprobs=request.logprobs,
            constraint=request.constraint,
        )
        made = self.running[slot] = RunningRequest(handle, sequence, slot)
        self._prefilling.append(made)
        return made

    def release(self, running: RunningRequest) -> None:
        """Empties a request's slot."""
        del self.running[running.slot]
        if running in self._prefilling:
            self._prefilling.remove(running)
        self.driver.clear(running.slot)

    def end(self, running: RunningRequest, reason: str | None = None) -> Generation:
        """The sequence as it stands, ended by itself or for a reason from outside; empties its slot."""
        result = self.stop(running, reason)
        self.release(running)
        return result

    def stop(self, running: RunningRequest, reason: str | None) -> Generation:
        """As ``end``, but leaves the slot to the step that is being run."""
        if reason is not None:
            running.sequence.end(reason)
        running.over = True
        return running.sequence.result(self.driver.depth[running.slot], running.known)

    def prefill(self) -> list[Sampled]:
        """One chunk of one prompt, each prompt in turn; with its last chunk comes the first token."""
        if not self._prefilling:
            return []
        running = self._prefilling.popleft()
        prompt, settings = running.handle.request.prompt, running.sequence.options.loops
        if self.prefixes is not None and not running.fed:
            running.fed = running.known = self.prefixes.restore(self.driver, running.slot, prompt, settings)
            if running.known:
                self.reused(running.known)
        chunk = prompt[running.fed : running.fed + (settings.chunk or self.driver.manifest.chunk)]
        try:
            logits, first = self._advance(running.slot, 1, {running.slot: (chunk, settings)}, [running])
        except Interrupted:
            return []
        running.fed += len(chunk)
        self.prefilled(len(chunk))
        if running.over:
            return []
        if running.fed < len(prompt):
            self._prefilling.append(running)
            return []
        if self.prefixes is not None:
            self.prefixes.keep(self.driver, running.slot, prompt, settings)
        return [self._sample(running, logits, first)]

    def decode(self) -> list[Sampled]:
        """One token of every sequence whose prompt is through, in one batch from slot 0 to the last of them."""
        ready = [one for _, one in sorted(self.running.items()) if one.token is not None]
        if not ready:
            return []
        work: Work = {one.slot: ((one.token,), one.sequence.options.loops) for one in ready if one.token is not None}
        try:
            logits, first = self._advance(0, ready[-1].slot + 1, work, ready)
        except Interrupted:
            return []
        return [self._sample(one, logits, first) for one in ready if not one.over]

    def _advance(self, first: int, count: int, work: Work, whose: Sequence[RunningRequest]) -> tuple[NextLogits, int]:
        """Runs new tokens by slot on a part of the batch, or where there is none on the whole. Returns the logits, and
        which slot the first row of them is. ``whose``: the sequences whose tokens they are. Raises Interrupted when
        all of them are over."""
        if (first, count) not in self._parts:
            part = self.driver.part(first, count)
            if part is None:
                first, count = 0, self.driver.batch
            else:
                self._parts[first, count] = part
        idle: tuple[tuple[int, ...], LoopSettings] = ((), _IDLE)
        each = [work.get(slot, idle) for slot in range(first, first + count)]
        tokens, settings = [one[0] for one in each], [one[1] for one in each]
        return self._parts[first, count].advance(tokens, settings, partial(self._between, first, whose)), first

    def _between(self, first: int, whose: Sequence[RunningRequest], active: NDArray[np.bool_] | None = None) -> None:
        """Looks up between two loops. Raises Interrupted when all who are still in them are over; ``active``: who is,
        from slot ``first`` on (None: all)."""
        self._look()
        if all(one.over or not (active is None or active[one.slot - first]) for one in whose):
            raise Interrupted

    def _sample(self, running: RunningRequest, logits: NextLogits, first: int) -> Sampled:
        """The next token of a sequence; an error of its own sampling or constraint is its own alone."""
        slot = running.slot
        try:
            delta = running.sequence.sample(logits, self.driver.room(slot), self.driver.depth[slot][-1], slot - first)
        except ArgumentError as error:
            return running, error
        running.token = delta.token_id
        return running, delta
