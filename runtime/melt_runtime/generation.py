"""Token after token: sampling, stopping and streaming over a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .driver import LoopDriver
from .errors import ArgumentError, PromptError
from .text import TextCodec
from .track import Generation, GenerationOptions, Piece, Track


class Generator:
    """Generates a continuation of every sequence of a batch.

    Iterating yields the pieces as they come; ``results`` holds the finished sequences afterwards. Sequences that end
    sit idle while the others go on. streamed: as of a Track. Raises PromptError for an empty prompt or one that does
    not fit.
    """

    def __init__(
        self,
        driver: LoopDriver,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        codec: TextCodec | None,
        *,
        streamed: bool = True,
    ):
        if not all(len(prompt) for prompt in prompts):
            raise PromptError("the prompt is empty; give at least one token")
        if options.stop and codec is None:
            raise ArgumentError("stop strings need a tokenizer, and the package has none; use stop_ids")
        self.driver, self.options = driver, options
        self.tracks = [Track(slot, prompt, options, codec, streamed=streamed) for slot, prompt in enumerate(prompts)]
        self.pending: list[Sequence[int]] = [list(prompt) for prompt in prompts]
        driver.check(prompts)

    def __iter__(self) -> Iterator[Piece]:
        while any(self.pending):
            logits = self.driver.advance(self.pending, self.options.loops)
            for slot, track in enumerate(self.tracks):
                if not self.pending[slot]:
                    continue
                piece = track.draw(logits, self.driver.room(slot), self.driver.depth[slot][-1])
                self.pending[slot] = [piece.token_id] if piece.finish_reason is None else []
                yield piece

    def results(self) -> list[Generation]:
        """All sequences, once the iteration is over."""
        return [track.result(self.driver.depth[track.slot]) for track in self.tracks]
