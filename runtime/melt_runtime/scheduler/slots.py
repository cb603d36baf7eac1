"""The slots of a batch and the sequences in them: who is prefilled next, and one token for all who decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from ..decoding.loop_driver import Interrupted, LoopDriver
from ..decoding.next_logits import NextLogits
from ..decoding.prefix_cache import Prefixes
from ..decoding.sequence import Track
from ..decoding.settings import LoopSettings
from ..errors import ArgumentError, MeltError
from ..results import Generation, Piece
from ..text.tokenizer import TextCodec
from .request import Ticket

_IDLE = LoopSettings(1)  # of a slot that runs nothing


@dataclass(eq=False)
class Running:
    """A sequence in a slot: prefilled as far as ``fed`` tokens of its prompt, of which the first ``known`` were put
    back; ``token`` is the one to run next, None while the prompt is not through. ``over``: it ended in the middle of a
    step, after which its slot is emptied. Times are ``monotonic``'s."""

    ticket: Ticket
    track: Track
    slot: int
    fed: int = 0
    known: int = 0
    token: int | None = None
    started: float = field(default_factory=monotonic)
    last: float | None = None  # when its last token came
    over: bool = False


Drawn = tuple[Running, Piece | MeltError]
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
        self.running: dict[int, Running] = {}
        self._prefilling: deque[Running] = deque()
        self._parts: dict[tuple[int, int], LoopDriver] = {(0, driver.batch): driver}

    def free(self) -> int:
        """How many slots are empty."""
        return self.driver.batch - len(self.running)

    def admit(self, ticket: Ticket) -> Running:
        """Puts a request into the lowest free slot. Its random stream is the first, whatever the slot."""
        slot = next(slot for slot in range(self.driver.batch) if slot not in self.running)
        self.driver.clear(slot)
        request = ticket.request
        track = Track(
            slot,
            request.prompt,
            request.options,
            self.codec,
            stream=0,
            logprobs=request.logprobs,
            constraint=request.constraint,
        )
        made = self.running[slot] = Running(ticket, track, slot)
        self._prefilling.append(made)
        return made

    def release(self, sequence: Running) -> None:
        """Empties a sequence's slot."""
        del self.running[sequence.slot]
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        self.driver.clear(sequence.slot)

    def end(self, sequence: Running, reason: str | None = None) -> Generation:
        """The sequence as it stands, ended by itself or for a reason from outside; empties its slot."""
        result = self.stop(sequence, reason)
        self.release(sequence)
        return result

    def stop(self, sequence: Running, reason: str | None) -> Generation:
        """As ``end``, but leaves the slot to the step that is being run."""
        if reason is not None:
            sequence.track.end(reason)
        sequence.over = True
        return sequence.track.result(self.driver.depth[sequence.slot], sequence.known)

    def prefill(self) -> list[Drawn]:
        """One chunk of one prompt, each prompt in turn; with its last chunk comes the first token."""
        if not self._prefilling:
            return []
        sequence = self._prefilling.popleft()
        prompt, settings = sequence.ticket.request.prompt, sequence.track.options.loops
        if self.prefixes is not None and not sequence.fed:
            sequence.fed = sequence.known = self.prefixes.restore(self.driver, sequence.slot, prompt, settings)
            if sequence.known:
                self.reused(sequence.known)
        chunk = prompt[sequence.fed : sequence.fed + (settings.chunk or self.driver.manifest.chunk)]
        try:
            logits, first = self._advance(sequence.slot, 1, {sequence.slot: (chunk, settings)}, [sequence])
        except Interrupted:
            return []
        sequence.fed += len(chunk)
        self.prefilled(len(chunk))
        if sequence.over:
            return []
        if sequence.fed < len(prompt):
            self._prefilling.append(sequence)
            return []
        if self.prefixes is not None:
            self.prefixes.keep(self.driver, sequence.slot, prompt, settings)
        return [self._draw(sequence, logits, first)]

    def decode(self) -> list[Drawn]:
        """One token of every sequence whose prompt is through, in one batch from slot 0 to the last of them."""
        ready = [one for _, one in sorted(self.running.items()) if one.token is not None]
        if not ready:
            return []
        work: Work = {one.slot: ((one.token,), one.track.options.loops) for one in ready if one.token is not None}
        try:
            logits, first = self._advance(0, ready[-1].slot + 1, work, ready)
        except Interrupted:
            return []
        return [self._draw(one, logits, first) for one in ready if not one.over]

    def _advance(self, first: int, count: int, work: Work, whose: Sequence[Running]) -> tuple[NextLogits, int]:
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

    def _between(self, first: int, whose: Sequence[Running], active: NDArray[np.bool_] | None = None) -> None:
        """Looks up between two loops. Raises Interrupted when all who are still in them are over; ``active``: who is,
        from slot ``first`` on (None: all)."""
        self._look()
        if all(one.over or not (active is None or active[one.slot - first]) for one in whose):
            raise Interrupted

    def _draw(self, sequence: Running, logits: NextLogits, first: int) -> Drawn:
        """The next token of a sequence; an error of its own sampling or constraint is its own alone."""
        slot = sequence.slot
        try:
            piece = sequence.track.draw(logits, self.driver.room(slot), self.driver.depth[slot][-1], slot - first)
        except ArgumentError as error:
            return sequence, error
        sequence.token = piece.token_id
        return sequence, piece
