"""Generate token by token over a batch: sampling, stopping, streaming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, OvertakenError, PromptError
from ..package.manifest import Manifest
from ..results import Generation, PipelineUse, TextDelta
from ..sampling.constraint import Constraint, masked
from ..sampling.logprobs import logprobs_of
from ..sampling.sampler import Sampler
from ..text.prompts import token_ids
from ..text.stop_strings import StopMatcher
from ..text.stream_decoder import StreamDecoder
from ..text.tokenizer import TextTokenizer
from .chunking import checked_ids
from .loop_driver import LoopDriver
from .next_logits import NextLogits
from .pipeline import PipelineCounts, Pipelining
from .settings import GenerationOptions

Result = TypeVar("Result")


class TokenSequence:
    """One sequence: samples its tokens and decodes their text.

    ``stream``: the random stream of the seed (None: the slot's number). ``logprobs``: how many of the likeliest tokens
    each delta reports (None: no logprobs). ``constraint``: restricts the tokens that may be sampled. ``streamed``:
    whether every delta carries text; if False, all text comes with the last delta, which is faster.
    """

    def __init__(
        self,
        slot: int,
        prompt: Sequence[int],
        options: GenerationOptions,
        tokenizer: TextTokenizer | None,
        *,
        stream: int | None = None,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
        streamed: bool = True,
    ):
        self.slot, self.options = slot, options
        self.logprobs, self.constraint = logprobs, constraint
        self.history = list(prompt)
        self.prompt_tokens = len(prompt)
        self.sampler = Sampler(options.sampling, slot if stream is None else stream, self.prompt_tokens)
        self.decoder = None if tokenizer is None else StreamDecoder(tokenizer, shown=options.shown_ids, prompt=prompt)
        self.matcher = StopMatcher(
            options.stop, None if tokenizer is None else tokenizer.special_tokens_in(options.stop)
        )
        self.text: list[str] = []
        self.finish_reason: str | None = None
        self.counts: PipelineCounts | None = None  # of pipelined decoding, where the tokens may be pipelined
        self._streamed = streamed or bool(options.stop)  # stop strings are searched in every token's text
        self._unread: list[int] = []  # tokens whose text has not been decoded
        self._masked_at = -1  # the length of the history that the constraint was asked about
        self._allowed_next: NDArray[np.bool_] | None = None

    def sample(self, logits: NextLogits, room: int, depth: int, row: int | None = None) -> TextDelta:
        """Sample the next token. Raises ArgumentError if the logits or the constraint fail.

        ``room``: how many more tokens fit in the cache. ``depth``: loops run for the last token. ``row``: this
        sequence's row of the logits (None: its slot).
        """
        row = self.slot if row is None else row
        if self.constraint is None:
            token = logits.sample(row, self.sampler, self.history)
        else:
            token = self._allowed(logits, row, self.constraint)
        found = None if self.logprobs is None else logprobs_of(logits.row(row), token, self.logprobs)
        self.history.append(token)
        if self.constraint is not None:
            _asked(self.constraint.accept, token)
        if token in self.options.stop_ids:
            self.finish_reason = "stop"
        elif len(self.history) - self.prompt_tokens >= self.options.max_tokens or room < 1:
            self.finish_reason = "length"
        return TextDelta(self.slot, self._show(token), token, self.finish_reason, depth, found)

    def _allowed(self, logits: NextLogits, row: int, constraint: Constraint) -> int:
        allowed = self._mask(constraint)
        if allowed is None:
            return logits.sample(row, self.sampler, self.history)
        return self.sampler.sample(masked(logits.row(row), allowed), self.history)

    def sample_with(self, sampler: Sampler) -> None:
        """Go on with the random numbers of another sampler."""
        sampler.prompt_tokens = self.prompt_tokens
        self.sampler = sampler

    @property
    def pipeline_use(self) -> PipelineUse | None:
        """What pipelined decoding has done so far; None if it did not run."""
        return None if self.counts is None else self.counts.use()

    def pipelining(self) -> Pipelining | None:
        """Return how the tokens are pipelined; None: they are not."""
        # Made at every call: an object that is kept and refers to this one would be a cycle, and keep a grammar alive.
        return None if self.counts is None else Pipelining(self.draft, self.options.pipeline == "on")

    def draft(self, logits: NDArray[np.float32], ahead: Sequence[int]) -> int | None:
        """Predict the token after this sequence and ``ahead`` from an early loop's logits (vocab,).

        It takes the random number with which that token will be sampled, so the prediction holds wherever both logits
        lead to one token. None where no token follows, or where a constraint says nothing about the place.
        """
        if ahead and ahead[-1] in self.options.stop_ids:
            return None
        if len(self.history) - self.prompt_tokens + len(ahead) + 1 >= self.options.max_tokens:
            return None
        try:
            if self.constraint is not None:
                look_ahead: Any = getattr(self.constraint, "mask_ahead", lambda ahead: None)
                allowed = _asked_mask(look_ahead, ahead) if ahead else self._mask(self.constraint)
                if ahead and allowed is None:
                    return None
                logits = logits if allowed is None else masked(logits, allowed)
            sampling = self.options.sampling
            if sampling.temperature == 0 and not sampling.adjusts:
                return int(logits.argmax())
            return self.sampler.ahead(len(ahead)).sample(logits, [*self.history, *ahead])
        except ArgumentError:  # the final logits may be in order; if not, sampling from them reports it
            return None

    def _mask(self, constraint: Constraint) -> NDArray[np.bool_] | None:
        """Return the tokens that the constraint allows next, asked for once per token."""
        if self._masked_at != len(self.history):
            self._allowed_next = _asked_mask(constraint.mask, self.history[self.prompt_tokens :])
            self._masked_at = len(self.history)
        return self._allowed_next

    def _show(self, token: int) -> str:
        if self.decoder is None:
            return ""
        if token not in self.options.stop_ids:
            self._unread.append(token)
        if not self._streamed and self.finish_reason is None:
            return ""
        shown = self._read(self.decoder)
        if self.finish_reason is not None:
            shown += self._rest(self.decoder)
        if self.matcher.found is not None:
            self.finish_reason = "stop"
        self.text.append(shown)
        return shown

    def end(self, reason: str) -> None:
        """End the sequence for an external reason and flush the text held back for stop strings."""
        self.finish_reason = reason
        if self.decoder is not None and self.matcher.found is None:
            self.text.append(self._read(self.decoder) + self._rest(self.decoder))

    def _read(self, decoder: StreamDecoder) -> str:
        """Return the text that may be shown of the tokens sampled since the last call."""
        unread, self._unread = self._unread, []
        if not self.options.stop:
            return "".join(map(decoder.push, unread))
        if not self.matcher.special:
            return self.matcher.push("".join(map(decoder.push, unread)))[0]
        shown = []
        for token in unread:
            if token in self.matcher.special:
                shown += [self.matcher.push(decoder.settle())[0], self.matcher.push_special(token)[0]]
            else:
                shown.append(self.matcher.push(decoder.push(token))[0])
        return "".join(shown)

    def _rest(self, decoder: StreamDecoder) -> str:
        """Return the text held back until the end."""
        return self.matcher.push(decoder.flush())[0] + self.matcher.flush()

    def result(self, depth: Sequence[int], cached_tokens: int = 0) -> Generation:
        """Return the finished sequence."""
        assert self.finish_reason is not None
        tokens = tuple(self.history[self.prompt_tokens :])
        text, loops = "".join(self.text), self.options.loops.loops
        return Generation(
            text,
            tokens,
            self.finish_reason,
            self.prompt_tokens,
            tuple(depth),
            loops,
            cached_tokens,
            self.options.warnings,
            self.pipeline_use,
        )


def _asked(method: Callable[[Any], Result], argument: Any) -> Result:
    """Call a constraint. Raises ArgumentError for any exception in it."""
    try:
        return method(argument)
    except Exception as error:
        raise ArgumentError(f"the request's constraint failed: {error!r}") from error


def _asked_mask(method: Callable[[Any], Any], argument: Any) -> NDArray[np.bool_] | None:
    """Return a copy of the mask that a constraint gives: it may fill one array again and again."""

    def copied(argument: Any) -> NDArray[np.bool_] | None:
        mask = method(argument)
        return None if mask is None else np.array(mask, np.bool_)

    return _asked(copied, argument)


class Generator:
    """An iterator over the deltas of a batch of sequences; ``results`` then returns the finished sequences.

    Sequences that end stay idle until the others end. ``streamed``: as in ``TokenSequence``. ``first``: the random
    stream of the first sequence; the others use the following ones. Raises PromptError for a prompt that is empty or
    too long, OvertakenError if the driver was used elsewhere in between.
    """

    def __init__(
        self,
        driver: LoopDriver,
        prompts: Sequence[Any],
        options: GenerationOptions,
        tokenizer: TextTokenizer | None,
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
            tokenizer is not None,
        )
        self.sequences = [
            TokenSequence(slot, prompt, options, tokenizer, stream=first + slot, streamed=streamed)
            for slot, prompt in enumerate(self.pending)
        ]
        self._depth: list[tuple[int, ...]] = [()] * driver.batch  # of ended sequences
        if self.sequences:
            self.sequences[0].counts = driver.begin_pipeline(options)

    def __iter__(self) -> Iterator[TextDelta]:
        driver, moves, pipelining = self.driver, self.driver.moves, None
        while any(self.pending):
            self._require(moves)
            logits = driver.advance(self.pending, self.options.loops, pipelining=pipelining)
            pipelining = self.sequences[0].pipelining()  # not for a prompt, even of one token
            moves = driver.moves
            for slot, sequence in enumerate(self.sequences):
                if not self.pending[slot]:
                    continue
                self._require(moves)
                delta = sequence.sample(logits, driver.room(slot), driver.last_depth(slot))
                self.pending[slot] = [delta.token_id] if delta.finish_reason is None else []
                if delta.finish_reason is not None:
                    self._depth[slot] = tuple(driver.cached.depth(slot))
                yield delta

    def _require(self, moves: int) -> None:
        if self.driver.moves != moves:
            raise OvertakenError("another call has used this driver; give each generator a driver of its own")

    def results(self) -> list[Generation]:
        """Return all sequences. Call it after iterating."""
        return [sequence.result(self._depth[sequence.slot]) for sequence in self.sequences]


def check_request(
    prompts: Sequence[Sequence[int]],
    room: Sequence[int],
    manifest: Manifest,
    options: GenerationOptions,
    has_tokenizer: bool,
) -> None:
    """Raise PromptError or ArgumentError for a request that cannot run.

    ``room``: free positions per sequence. ``has_tokenizer``: whether the package has a tokenizer.
    """
    if len(prompts) != len(room):
        raise PromptError(f"the batch has {len(room)} sequences, tokens were given for {len(prompts)}")
    for prompt in prompts:
        check_not_empty(prompt)
    check_stop(options, has_tokenizer)
    for prompt, free in zip(prompts, room, strict=True):
        checked_ids(prompt, free, manifest)


def check_not_empty(prompt: Sequence[int]) -> None:
    """Raise PromptError for a prompt without tokens."""
    if not len(prompt):
        raise PromptError("the prompt is empty; give at least one token")


def check_stop(options: GenerationOptions, has_tokenizer: bool) -> None:
    """Raise ArgumentError for stop strings in a package without tokenizer."""
    if options.stop and not has_tokenizer:
        raise ArgumentError("stop strings need a tokenizer, and the package has none; use stop_ids")
