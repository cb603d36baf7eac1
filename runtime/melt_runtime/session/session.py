"""A session: a sequence that stays in the cache from call to call, and can branch, go back, and be saved."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray

from ..decoding.generator import TokenSequence, check_not_empty, check_stop
from ..decoding.next_logits import NextLogits
from ..decoding.pipeline import Pipelining
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
    from .file import Saved  # only for types: needs safetensors


P = ParamSpec("P")
R = TypeVar("R")


def synchronized(method: Callable[Concatenate[Session, P], R]) -> Callable[Concatenate[Session, P], R]:
    """Make a method wait while another thread is inside the session."""

    @wraps(method)
    def locked(self: Session, *arguments: P.args, **options: P.kwargs) -> R:
        with self._lock:
            return method(self, *arguments, **options)

    return locked


class Session:
    """A sequence that continues from call to call; opened by ``Runtime.session``. All memory is allocated then::

        session = runtime.session(temperature=0.7, seed=1)
        session.append("Once upon a time")
        print(session.generate(max_tokens=32).text)

    ``options``: those of ``Runtime.generate``, the defaults of all calls; a call's own options hold for that call.
    Sampling continues one random stream from call to call, but a call with sampling options of its own starts its own
    stream.

    Each ``append`` begins a chunk, and each sampled token is a chunk of its own. The last sampled token belongs to the
    session before it has run; the next call runs it. After a backend error, the session holds the chunks that ran
    completely.

    ``messages``: a chat's messages, or None; saved and copied to branches, without other effect. Calls from several
    threads wait for each other. All errors are MeltErrors.
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
        self._ids: list[int] = []  # token ids in the cache
        self._chunks: list[tuple[int, LoopSettings]] = []  # start and settings of each chunk
        self._pending: int | None = None  # the last sampled token, if it has not run
        self._logits: NextLogits | None = None  # after the last token, if that has run
        self._stream = object()  # identifies the stream that may continue

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    @synchronized
    def tokens(self) -> tuple[int, ...]:
        """All token ids, appended and sampled."""
        return (*self._ids, *self._pending_ids())

    @property
    @synchronized
    def depth(self) -> tuple[int, ...]:
        """The loops run for each token in the cache: all tokens but perhaps the last."""
        return tuple(self.driver.depth[0])

    @property
    @synchronized
    def chunks(self) -> tuple[int, ...]:
        """The index of the first token of each chunk in the cache."""
        return tuple(start for start, _ in self._chunks)

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        # A full session's last token was sampled and can never run.
        return max(self.driver.capacity - len(self), 0)

    @synchronized
    def append(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> None:
        """Run new tokens after the present ones, in chunks.

        Only the first text gets the tokenizer's special tokens, such as BOS. Raises PromptError, before any change, if
        there are no tokens or they do not fit; ArgumentError.
        """
        ids = self._encode(prompt)
        check_not_empty(ids)
        settings = self._request(options).loops
        self.driver.check([[*self._pending_ids(), *ids]])
        self._stream = object()
        self._run_pending(settings)
        prefixes = None if self._ids else self.prefixes
        self._run(ids, settings, prefixes)
        if prefixes is not None:
            prefixes.keep(self.driver, 0, ids, settings)

    @synchronized
    def generate(self, **options: Unpack[GenerateOptions]) -> Generation:
        """Continue the sequence. The result's ``prompt_tokens`` counts all tokens before. Raises PromptError,
        ArgumentError."""
        sequence = self._sequence(options, streamed=False)
        for _ in self._deltas(sequence, self._stream):
            pass
        return sequence.result(self.driver.depth[0])

    def stream(self, **options: Unpack[GenerateOptions]) -> Iterator[str]:
        """Continue the sequence and yield text as it is generated.

        Tokens sampled until the caller stops reading stay in the session. Raises OvertakenError once another call has
        moved the session on.
        """
        if self.runtime.tokenizer is None:
            raise ArgumentError("the package has no tokenizer; use generate with token ids")
        return (delta.text for delta in self.deltas(**options) if delta.text)

    @synchronized
    def deltas(self, **options: Unpack[GenerateOptions]) -> Iterator[TextDelta]:
        """Continue as ``stream`` does, but yield a delta per token, even without text."""
        return self._deltas(self._sequence(options), self._stream)

    @synchronized
    def logits(self, **options: Unpack[GenerateOptions]) -> NDArray[np.float32]:
        """Return the logits after the last token (vocab,); run that token first if needed. Raises PromptError,
        ArgumentError."""
        settings = self._request(options).loops
        self._stream = object()
        return self._ready(settings).row(0).copy()

    @synchronized
    def fork(self) -> Session:
        """Return a copy of the session, its random stream included, that shares nothing with it. Raises
        BackendError."""
        made = type(self)(self.runtime, prefixes=self.prefixes, **self.options)
        made.sampler.restore(self.sampler.state())
        made._take(self._ids, self.driver.depth[0], self._chunks, self._pending, self._positions())
        made.messages = self.messages
        return made

    @synchronized
    def rewind(self, count: int) -> None:
        """Drop the last ``count`` tokens. Raises ArgumentError if there are fewer."""
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= len(self):
            raise ArgumentError(f"count is {count!r}; it must lie between 0 and the {len(self)} tokens of the session")
        self.truncate(len(self) - count)

    @synchronized
    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens with their chunks; the random stream goes on. Raises ArgumentError."""
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= len(self):
            raise ArgumentError(
                f"length is {length!r}; it must lie between 0 and the {len(self)} tokens of the session"
            )
        if length == len(self):
            return
        self._stream = object()
        self._pending = self._logits = None
        self._cut(min(length, len(self._ids)))

    @synchronized
    def reset(self) -> None:
        """Drop all tokens, even after a call interrupted by KeyboardInterrupt; the random stream goes on."""
        self._stream = object()
        self.driver.reset()
        self._ids, self._chunks, self._pending, self._logits = [], [], None, None

    @synchronized
    def save(self, path: Path | str) -> None:
        """Write the session to a file, whole or not at all, with the used part of the caches.

        Raises SessionError; ArgumentError for options that JSON cannot hold.
        """
        from . import file as session_file  # imported here, because only files need safetensors

        settings = list(dict.fromkeys(settings for _, settings in self._chunks))
        session_file.write(
            Path(path),
            session_file.Saved(
                package=session_file.package_hash(self.runtime.package),
                options=self.options,
                random=self.sampler.state(),
                tokens=np.array(self._ids, np.int64),
                depth=np.array(self.driver.depth[0], np.int64),
                pending=self._pending,
                chunk_starts=np.array(self.chunks, np.int64),
                chunk_settings=np.array([settings.index(one) for _, one in self._chunks], np.int64),
                settings=settings,
                positions=self._positions(),
                messages=self.messages,
            ),
        )

    @classmethod
    def load(cls, runtime: LoadedModel, path: Path | str, *, prefixes: Prefixes | None = None) -> Self:
        """Load a saved session; it continues with the tokens that the saved one would have sampled.

        Raises SessionError for a file that is damaged, changed or of another package; BackendError.
        """
        from . import file as session_file

        saved = session_file.read(Path(path), runtime.package, runtime.options)
        made = cls(runtime, prefixes=prefixes, **saved.options)
        made.restore(saved)
        return made

    @synchronized
    def restore(self, saved: Saved) -> None:
        """Take over a saved session in this session's memory. Raises BackendError; the session is then empty."""
        which = zip(saved.chunk_starts.tolist(), saved.chunk_settings.tolist(), strict=True)
        chunks = [(start, saved.settings[index]) for start, index in which]
        self.reset()
        self._take(saved.tokens.tolist(), saved.depth.tolist(), chunks, saved.pending, saved.positions)
        self.options, self.messages = saved.options, saved.messages
        self.sampler = Sampler(self.runtime.options(**saved.options).sampling)
        self.sampler.restore(saved.random)

    def _take(
        self,
        ids: Sequence[int],
        depth: Sequence[int],
        chunks: Sequence[tuple[int, LoopSettings]],
        pending: int | None,
        positions: dict[str, NDArray[Any]],
    ) -> None:
        """Fill an empty session."""
        self.driver.restore(0, positions, depth)
        self._ids, self._chunks, self._pending = list(ids), list(chunks), pending

    def _positions(self) -> dict[str, NDArray[Any]]:
        """Return the used positions of all caches."""
        depth = self.driver.depth[0]
        return self.driver.state.read_positions(0, 0, len(depth), max(depth)) if depth else {}

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) and self.runtime.tokenizer is not None and len(self):
            return self.runtime.tokenizer.encode(prompt, add_special_tokens=False)
        return self.runtime.encode(prompt)

    def _request(self, options: GenerateOptions) -> GenerationOptions:
        request = self.runtime.options(**{**self.options, **options})
        self.runtime.warn(request)
        return request

    def _sequence(self, options: GenerateOptions, *, streamed: bool = True) -> TokenSequence:
        """Check a call's options and start a stream; earlier streams can no longer continue."""
        request = self._request(options)
        check_stop(request, self.runtime.tokenizer is not None)
        self._require_tokens()
        self.driver.check([self._pending_ids()])
        sequence = TokenSequence(0, self.tokens, request, self.runtime.tokenizer, streamed=streamed)
        sequence.counts = self.driver.begin_pipeline(request)
        if not SamplingParams.__dataclass_fields__.keys() & options.keys():
            sequence.sample_with(self.sampler)
        self._stream = object()
        return sequence

    def _deltas(self, sequence: TokenSequence, stream: object) -> Iterator[TextDelta]:
        while sequence.finish_reason is None:
            with self._lock:
                if self._stream is not stream:
                    raise OvertakenError("the session moved on while this stream was open; begin another")
                logits = self._ready(sequence.options.loops, sequence.pipelining())
                delta = sequence.sample(logits, self.driver.room(0), self.driver.depth[0][-1])
                self._pending, self._logits = delta.token_id, None
            yield delta

    def _ready(self, settings: LoopSettings, pipelining: Pipelining | None = None) -> NextLogits:
        """Return the logits after the last token.

        Runs a pending token. After going back, runs the last chunk again with its settings, because logits are not
        kept.
        """
        self._run_pending(settings, pipelining)
        if self._logits is None:
            self._require_tokens()
            start, before = self._chunks[-1]
            ids = self._ids[start:]
            self._cut(start)
            self._run(ids, before)
        assert self._logits is not None
        return self._logits

    def _run_pending(self, settings: LoopSettings, pipelining: Pipelining | None = None) -> None:
        if self._pending is not None:
            self._run([self._pending], settings, pipelining=pipelining)
            self._pending = None

    def _run(
        self,
        ids: Sequence[int],
        settings: LoopSettings,
        prefixes: Prefixes | None = None,
        pipelining: Pipelining | None = None,
    ) -> None:
        """Run tokens after restoring a known beginning. On errors too, ids and chunks match the cache."""
        before, self._logits = len(self._ids), None
        try:
            known = 0 if prefixes is None else prefixes.restore(self.driver, 0, ids, settings)
            self._logits = self.driver.advance([ids[known:]], settings, pipelining=pipelining)
        finally:
            ran = int(self.driver.lengths[0]) - before
            self._ids += ids[:ran]
            size = settings.chunk or self.driver.manifest.chunk
            self._chunks += [(start, settings) for start in range(before, before + ran, size)]

    def _cut(self, length: int) -> None:
        self.driver.truncate(0, length)
        del self._ids[length:]
        self._chunks = [chunk for chunk in self._chunks if chunk[0] < length]

    def _require_tokens(self) -> None:
        if not len(self):
            raise PromptError("the session is empty; append a prompt first")

    def _pending_ids(self) -> list[int]:
        return [] if self._pending is None else [self._pending]
