"""Token after token: sampling, stopping and streaming over a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import ArgumentError, OvertakenError, PromptError
from ..package.manifest import Manifest
from ..results import Generation, TextDelta
from ..text.prompts import token_ids
from ..text.tokenizer import TextCodec
from .loop_driver import LoopDriver, checked_ids
from .sequence import TokenSequence
from .settings import GenerationOptions


class Generator:
    """Generates a continuation of every sequence of a batch.

    Iterating yields the deltas as they come; ``results`` returns the finished sequences afterwards. Sequences that end
    stay idle while the others go on. ``streamed``: as in ``TokenSequence``. ``first``: which of a seed's random streams
    the first sequence samples from; the others use those after it. Raises PromptError for an empty prompt or one that
    does not fit; OvertakenError when somebody else has used the driver in the meantime.
    """

    def __init__(
        self,
        driver: LoopDriver,
        prompts: Sequence[Any],
        options: GenerationOptions,
        codec: TextCodec | None,
        *,
        streamed: bool = True,
        first: int = 0,
    ):
        self.driver, self.options = driver, options
        self.pending: list[Sequence[int]] = [token_ids(prompt) for prompt in prompts]
        check_request(
            self.pending,
            [driver.room(slot) for slot in range(driver.batch)],
            driver.manifest,
            options,
            codec is not None,
        )
        self.sequences = [
            TokenSequence(slot, prompt, options, codec, stream=first + slot, streamed=streamed)
            for slot, prompt in enumerate(self.pending)
        ]
        self._depth: list[tuple[int, ...]] = [()] * driver.batch  # of those that have ended

    def __iter__(self) -> Iterator[TextDelta]:
        driver, moves = self.driver, self.driver.moves
        while any(self.pending):
            self._require(moves)
            logits = driver.advance(self.pending, self.options.loops)
            moves = driver.moves
            for slot, sequence in enumerate(self.sequences):
                if not self.pending[slot]:
                    continue
                self._require(moves)
                delta = sequence.sample(logits, driver.room(slot), driver.depth[slot][-1])
                self.pending[slot] = [delta.token_id] if delta.finish_reason is None else []
                if delta.finish_reason is not None:
                    self._depth[slot] = tuple(driver.depth[slot])
                yield delta

    def _require(self, moves: int) -> None:
        if self.driver.moves != moves:
            raise OvertakenError("another call has used this driver; give each generator a driver of its own")

    def results(self) -> list[Generation]:
        """All sequences, once the iteration is over."""
        return [sequence.result(self._depth[sequence.slot]) for sequence in self.sequences]


def check_request(
    prompts: Sequence[Sequence[int]],
    room: Sequence[int],
    manifest: Manifest,
    options: GenerationOptions,
    tokenizer: bool,
) -> None:
    """Raises PromptError or ArgumentError for what cannot run. room: how many tokens of each sequence fit; tokenizer:
    whether the package has one."""
    if len(prompts) != len(room):
        raise PromptError(f"the batch has {len(room)} sequences, tokens were given for {len(prompts)}")
    if not all(len(prompt) for prompt in prompts):
        raise PromptError("the prompt is empty; give at least one token")
    if options.stop and not tokenizer:
        raise ArgumentError("stop strings need a tokenizer, and the package has none; use stop_ids")
    for prompt, free in zip(prompts, room, strict=True):
        checked_ids(prompt, free, manifest)
