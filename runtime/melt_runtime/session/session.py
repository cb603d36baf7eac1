"""A conversation: its tokens stay in the cache from call to call; it can branch, go back, and be saved."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray

from ..decoding.generator import TokenSequence
from ..decoding.loop_driver import NextLogits
from ..decoding.prefix_cache import Prefixes
from ..decoding.request_options import GenerateOptions, plain_options
from ..decoding.settings import GenerationOptions, LoopSettings
from ..errors import ArgumentError, OvertakenError, PromptError
from ..loaded_model import LoadedModel
from ..results import Generation, TextDelta
from ..sampling.sampler import Sampler, SamplingParams
from ..text.prompts import Prompt
from ..text.tokenizer import Message

if TYPE_CHECKING:
    from .file import Saved  # safetensors, which only files need


P = ParamSpec("P")
R = TypeVar("R")


def in_turn(method: Callable[Concatenate[Session, P], R]) -> Callable[Concatenate[Session, P], R]:
    """A method that waits until no other thread is inside the session."""

    @wraps(method)
    def waiting(self: Session, *arguments: P.args, **options: P.kwargs) -> R:
        with self._lock:
            return method(self, *arguments, **options)

    return waiting


class Session:
    """One sequence that goes on; ``Runtime.session`` opens it. All memory is allocated when it opens.

        session = runtime.session(temperature=0.7, seed=1)
        session.append("Once upon a time")
        print(session.generate(max_tokens=32).text)

    ``options``, those of ``Runtime.generate``, hold for all calls; a call's own hold for that call. Draws go on in one
    random stream from call to call, except that a call with sampling options of its own has a stream of its own.

    What ``append`` is given begins a chunk; each token that was drawn is a chunk by itself. The last one drawn is part
    of the conversation before it has run: the next call runs it. After an error of the backend the session holds the
    chunks that ran whole. ``messages``: what was said, for who keeps a chat (None: nobody does); it goes into the file
    and into branches, and changes nothing else. Calls from several threads wait for each other. Raises errors of the
    MeltError family only.
    """

    def __init__(self, runtime: LoadedModel, *, prefixes: Prefixes | None = None, **options: Unpack[GenerateOptions]):
        self.options = plain_options(options)
        request = runtime.options(**self.options)
        runtime.warn(request)
        self._lock = threading.RLock()
        self.runtime, self.prefixes = runtime, prefixes
        self.messages: tuple[Message, ...] | None = None
        self.sampler = Sampler(request.sampling)
        self.driver = runtime.driver(1)
        if prefixes is not None:
            prefixes.claim(self.driver)
        self._ids: list[int] = []  # in the cache
        self._chunks: list[tuple[int, LoopSettings]] = []  # where each begins, and how it ran
        self._drawn: int | None = None  # the last token, whose row is not in the cache yet
        self._logits: NextLogits | None = None  # after the last token, if it is the last that ran
        self._turn = object()  # of the stream that may go on

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    @in_turn
    def tokens(self) -> tuple[int, ...]:
        """All token ids: what was appended and what was drawn."""
        return (*self._ids, *self._waiting())

    @property
    @in_turn
    def depth(self) -> tuple[int, ...]:
        """Loops spent on each token that has run: all, but perhaps the last."""
        return tuple(self.driver.depth[0])

    @property
    @in_turn
    def chunks(self) -> tuple[int, ...]:
        """Where each chunk of the tokens that have run begins."""
        return tuple(start for start, _ in self._chunks)

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        # The last token of a full session was drawn and can never run.
        return max(self.driver.capacity - len(self), 0)

    @in_turn
    def append(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> None:
        """Runs new tokens behind those that are there, in chunks. Only a first text gets what the tokenizer puts around
        one, such as BOS. Raises PromptError, before anything changes, if they are none or do not fit; ArgumentError."""
        ids = self._encode(prompt)
        if not ids:
            raise PromptError("the prompt is empty; give at least one token")
        settings = self._request(options).loops
        self.driver.check([[*self._waiting(), *ids]])
        self._turn = object()
        self._run_drawn(settings)
        prefixes = None if self._ids else self.prefixes
        self._run(ids, settings, prefixes)
        if prefixes is not None:
            prefixes.keep(self.driver, 0, ids, settings)

    @in_turn
    def generate(self, **options: Unpack[GenerateOptions]) -> Generation:
        """Continues the conversation. Its ``prompt_tokens`` are all that there were before.

        Raises PromptError, ArgumentError."""
        sequence = self._sequence(options, streamed=False)
        for _ in self._deltas(sequence, self._turn):
            pass
        return sequence.result(self.driver.depth[0])

    def stream(self, **options: Unpack[GenerateOptions]) -> Iterator[str]:
        """Continues the conversation and yields text as it comes. What was drawn stays, wherever the caller stops; once
        another call has moved the session on, the stream raises OvertakenError."""
        if self.runtime.codec is None:
            raise ArgumentError("the package has no tokenizer; use generate with token ids")
        return (delta.text for delta in self.deltas(**options) if delta.text)

    @in_turn
    def deltas(self, **options: Unpack[GenerateOptions]) -> Iterator[TextDelta]:
        """As ``stream``, but a delta for every token, whether or not it has text yet."""
        return self._deltas(self._sequence(options), self._turn)

    @in_turn
    def logits(self, **options: Unpack[GenerateOptions]) -> NDArray[np.float32]:
        """The logits after the last token (vocab,), which runs if it has not. Raises PromptError, ArgumentError."""
        settings = self._request(options).loops
        self._turn = object()
        return self._ready(settings).row(0).copy()

    @in_turn
    def fork(self) -> Session:
        """A second session that stands where this one does, its random stream too; afterwards they share nothing.
        Raises BackendError where there is no memory for it."""
        made = type(self)(self.runtime, prefixes=self.prefixes, **self.options)
        made.sampler.restore(self.sampler.state())
        made._take(self._ids, self.driver.depth[0], self._chunks, self._drawn, self._positions())
        made.messages = self.messages
        return made

    @in_turn
    def rewind(self, count: int) -> None:
        """Drops the last ``count`` tokens. Raises ArgumentError for more than there are."""
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= len(self):
            raise ArgumentError(f"count is {count!r}; it must lie between 0 and the {len(self)} tokens of the session")
        self.truncate(len(self) - count)

    @in_turn
    def truncate(self, length: int) -> None:
        """Keeps the first ``length`` tokens and their rows, and how they were chunked. The random stream goes on.

        Raises ArgumentError for more than there are."""
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= len(self):
            raise ArgumentError(
                f"length is {length!r}; it must lie between 0 and the {len(self)} tokens of the session"
            )
        if length == len(self):
            return
        self._turn = object()
        self._drawn = self._logits = None
        self._cut(min(length, len(self._ids)))

    @in_turn
    def reset(self) -> None:
        """Forgets all tokens, even where a call was torn off in its middle, as KeyboardInterrupt does. The random
        stream goes on."""
        self._turn = object()
        self.driver.reset()
        self._ids, self._chunks, self._drawn, self._logits = [], [], None, None

    @in_turn
    def save(self, path: Path | str) -> None:
        """Writes all of it to a file, whole or not at all; the caches as far as they are used. Raises SessionError,
        ArgumentError for options that cannot be written."""
        from . import file as session_file  # safetensors, which only this needs

        settings = list(dict.fromkeys(settings for _, settings in self._chunks))
        session_file.write(
            Path(path),
            session_file.Saved(
                package=session_file.package_hash(self.runtime.package),
                options=self.options,
                random=self.sampler.state(),
                tokens=np.array(self._ids, np.int64),
                depth=np.array(self.driver.depth[0], np.int64),
                drawn=self._drawn,
                chunk_starts=np.array(self.chunks, np.int64),
                chunk_settings=np.array([settings.index(one) for _, one in self._chunks], np.int64),
                settings=settings,
                positions=self._positions(),
                messages=self.messages,
            ),
        )

    @classmethod
    def load(cls, runtime: LoadedModel, path: Path | str, *, prefixes: Prefixes | None = None) -> Self:
        """A session as it was saved: it goes on with exactly the tokens that the saved one would have drawn. Raises
        SessionError for a file that is damaged, was changed or belongs to another package; BackendError."""
        from . import file as session_file

        saved = session_file.read(Path(path), runtime.package, runtime.options)
        made = cls(runtime, prefixes=prefixes, **saved.options)
        made.restore(saved)
        return made

    @in_turn
    def restore(self, saved: Saved) -> None:
        """Becomes the session that ``session_file.read`` gave, in the memory that this one has. Raises BackendError,
        and then it is empty."""
        which = zip(saved.chunk_starts.tolist(), saved.chunk_settings.tolist(), strict=True)
        chunks = [(start, saved.settings[index]) for start, index in which]
        self.reset()
        self._take(saved.tokens.tolist(), saved.depth.tolist(), chunks, saved.drawn, saved.positions)
        self.options, self.messages = saved.options, saved.messages
        self.sampler = Sampler(self.runtime.options(**saved.options).sampling)
        self.sampler.restore(saved.random)

    def _take(
        self,
        ids: Sequence[int],
        depth: Sequence[int],
        chunks: Sequence[tuple[int, LoopSettings]],
        drawn: int | None,
        positions: dict[str, NDArray[Any]],
    ) -> None:
        """Fills an empty session."""
        self.driver.restore(0, positions, depth)
        self._ids, self._chunks, self._drawn = list(ids), list(chunks), drawn

    def _positions(self) -> dict[str, NDArray[Any]]:
        """The used rows of all caches."""
        depth = self.driver.depth[0]
        return self.driver.state.read_positions(0, 0, len(depth), max(depth)) if depth else {}

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) and self.runtime.codec is not None and len(self):
            return self.runtime.codec.encode(prompt, add_special_tokens=False)
        return self.runtime.encode(prompt)

    def _request(self, options: GenerateOptions) -> GenerationOptions:
        request = self.runtime.options(**{**self.options, **options})
        self.runtime.warn(request)
        return request

    def _sequence(self, options: GenerateOptions, *, streamed: bool = True) -> TokenSequence:
        """A call's request, checked; from now on no other stream may go on."""
        request = self._request(options)
        if request.stop and self.runtime.codec is None:
            raise ArgumentError("stop strings need a tokenizer, and the package has none; use stop_ids")
        if not len(self):
            raise PromptError("the session is empty; append a prompt first")
        self.driver.check([self._waiting()])
        sequence = TokenSequence(0, self.tokens, request, self.runtime.codec, streamed=streamed)
        if not SamplingParams.__dataclass_fields__.keys() & options.keys():
            sequence.sampler = self.sampler
        self._turn = object()
        return sequence

    def _deltas(self, sequence: TokenSequence, turn: object) -> Iterator[TextDelta]:
        while sequence.finish_reason is None:
            with self._lock:
                if self._turn is not turn:
                    raise OvertakenError("the session moved on while this stream was open; begin another")
                logits = self._ready(sequence.options.loops)
                delta = sequence.sample(logits, self.driver.room(0), self.driver.depth[0][-1])
                self._drawn, self._logits = delta.token_id, None
            yield delta

    def _ready(self, settings: LoopSettings) -> NextLogits:
        """The logits after the last token. It runs if it has not; after going back its chunk runs again as far as it is
        kept, as it ran before, for rows are kept and logits are not."""
        self._run_drawn(settings)
        if self._logits is None:
            if not self._ids:
                raise PromptError("the session is empty; append a prompt first")
            start, before = self._chunks[-1]
            ids = self._ids[start:]
            self._cut(start)
            self._run(ids, before)
        assert self._logits is not None
        return self._logits

    def _run_drawn(self, settings: LoopSettings) -> None:
        if self._drawn is not None:
            self._run([self._drawn], settings)
            self._drawn = None

    def _run(self, ids: Sequence[int], settings: LoopSettings, prefixes: Prefixes | None = None) -> None:
        """Runs tokens, but for a beginning that is known; whatever happens, the books agree."""
        before, self._logits = len(self._ids), None
        try:
            known = 0 if prefixes is None else prefixes.restore(self.driver, 0, ids, settings)
            self._logits = self.driver.advance([ids[known:]], settings)
        finally:
            ran = int(self.driver.lengths[0]) - before
            self._ids += ids[:ran]
            size = settings.chunk or self.driver.manifest.chunk
            self._chunks += [(start, settings) for start in range(before, before + ran, size)]

    def _cut(self, length: int) -> None:
        self.driver.truncate(0, length)
        del self._ids[length:]
        self._chunks = [chunk for chunk in self._chunks if chunk[0] < length]

    def _waiting(self) -> list[int]:
        return [] if self._drawn is None else [self._drawn]
