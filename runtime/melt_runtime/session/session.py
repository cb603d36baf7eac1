"""A session: a sequence that stays in the cache from call to call, and can branch, go back, and be saved."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar, Unpack

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


class _Tail(NamedTuple):
    """The tokens of a session that are still to run, behind those in the cache.

    ``end``: the session's number of tokens; less counts as what is in the cache. ``known``: the tokens before this
    place have run already, in the session's chunks, and run again as they did then.
    """

    end: int = 0
    known: int = 0


class Session:
    """A sequence that continues from call to call; opened by ``Runtime.session``. All memory is allocated then::

        session = runtime.session(temperature=0.7, seed=1)
        session.append("Once upon a time")
        print(session.generate(max_tokens=32).text)

    ``options``: those of ``Runtime.generate``, the defaults of all calls; a call's own options hold for that call.
    Sampling continues one random stream from call to call, but a call with sampling options of its own starts its own
    stream.

    Each ``append`` begins a chunk, and each sampled token is a chunk of its own. The last sampled token belongs to the
    session before it has run; the next call runs it. A call that ends early, by a backend error or by
    KeyboardInterrupt, loses no token of the session: it then holds what it held before the call, the chunks of new
    tokens that ran completely, and what was sampled. The next call goes on from there.

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
        # What counts of these lists is told by the driver's length and by ``_tail``, each written in one step and after
        # the lists: an exception at any place leaves a session that can go on.
        self._ids: list[int] = []
        self._chunks: list[tuple[int, LoopSettings]] = []  # start and settings of each chunk
        self._tail = _Tail()
        self._logits: NextLogits | None = None  # after the last token in the cache
        self._stream = object()  # identifies the stream that may continue

    @synchronized
    def __len__(self) -> int:
        return max(self._cached, self._tail.end)

    @property
    @synchronized
    def tokens(self) -> tuple[int, ...]:
        """All token ids, appended and sampled."""
        return tuple(self._ids[: len(self)])

    @property
    @synchronized
    def depth(self) -> tuple[int, ...]:
        """The loops run for each token in the cache: all tokens but perhaps the last."""
        return tuple(self.driver.cached.depth(0))

    @property
    @synchronized
    def chunks(self) -> tuple[int, ...]:
        """The index of the first token of each chunk in the cache."""
        return tuple(start for start, _ in self._cached_chunks())

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
        self.driver.check([[*self._owed(), *ids]])
        self._stream = object()
        self._run_owed(settings)
        prefixes = None if len(self) else self.prefixes
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
        return sequence.result(self.driver.cached.depth(0))

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
        self._rerun()
        depth = self.driver.cached.depth(0)
        made._take(self.tokens, depth, self._cached_chunks(), self._positions())
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
        self._keep(length, min(length, self._cached))

    @synchronized
    def reset(self) -> None:
        """Drop all tokens, even after a call interrupted by KeyboardInterrupt; the random stream goes on."""
        self._stream = object()
        self._keep(0, 0)
        self._ids, self._chunks = [], []

    @synchronized
    def save(self, path: Path | str) -> None:
        """Write the session to a file, whole or not at all, with the used part of the caches.

        Raises SessionError; ArgumentError for options that JSON cannot hold.
        """
        from . import file as session_file  # imported here, because only files need safetensors

        self._rerun()
        chunks, ids, owed = self._cached_chunks(), self._ids[: self._cached], self._owed()
        settings = list(dict.fromkeys(settings for _, settings in chunks))
        session_file.write(
            Path(path),
            session_file.Saved(
                package=session_file.package_hash(self.runtime.package),
                options=self.options,
                random=self.sampler.state(),
                tokens=np.array(ids, np.int64),
                depth=np.array(self.driver.cached.depth(0), np.int64),
                pending=owed[0] if owed else None,
                chunk_starts=np.array([start for start, _ in chunks], np.int64),
                chunk_settings=np.array([settings.index(one) for _, one in chunks], np.int64),
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
        pending = [] if saved.pending is None else [saved.pending]
        self._take([*saved.tokens.tolist(), *pending], saved.depth.tolist(), chunks, saved.positions)
        self.options, self.messages = saved.options, saved.messages
        self.sampler = Sampler(self.runtime.options(**saved.options).sampling)
        self.sampler.restore(saved.random)

    def _take(
        self,
        ids: Sequence[int],
        depth: Sequence[int],
        chunks: Sequence[tuple[int, LoopSettings]],
        positions: dict[str, NDArray[Any]],
    ) -> None:
        """Fill an empty session; ``depth`` and ``positions`` are of its tokens in the cache."""
        self._ids, self._chunks = list(ids), list(chunks)
        self.driver.restore(0, positions, depth)
        self._tail = _Tail(len(ids))

    def _positions(self) -> dict[str, NDArray[Any]]:
        """Return the used positions of all caches."""
        depth = self.driver.cached.depth(0)
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
        self.driver.check([self._owed()])
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
                before, random = len(self), sequence.sampler.state() if sequence.options.sampling.temperature else None
                try:
                    delta = sequence.sample(logits, self.driver.room(0), self.driver.last_depth(0))
                    self._ids[before:] = [delta.token_id]
                    self._tail = _Tail(before + 1)
                except BaseException:
                    if random is not None and len(self) == before:
                        sequence.sampler.restore(random)
                    raise
            yield delta

    def _ready(self, settings: LoopSettings, pipelining: Pipelining | None = None) -> NextLogits:
        """Return the logits after the last token, after running what is still to run.

        After going back, runs the last chunk again with its settings, because logits are not kept.
        """
        self._run_owed(settings, pipelining)
        if self._logits is None:
            self._require_tokens()
            self._keep(self._cached, self._cached_chunks()[-1][0])
            self._rerun()
        assert self._logits is not None
        return self._logits

    def _run_owed(self, settings: LoopSettings, pipelining: Pipelining | None = None) -> None:
        """Run the tokens that are still to run; with these settings those that have not run before."""
        self._rerun()
        if owed := self._owed():
            self._run(owed, settings, pipelining=pipelining)

    def _rerun(self) -> None:
        """Run the tokens again that have left the cache and are still the session's, each chunk as it ran before."""
        while (start := self._cached) < self._tail.known:
            at = bisect_left(self._chunks, start, key=itemgetter(0))
            following = self._chunks[at + 1][0] if at + 1 < len(self._chunks) else self._tail.known
            self._logits = None
            ids = self._ids[start : min(following, self._tail.known)]
            self._logits = self.driver.advance([ids], self._chunks[at][1])

    def _run(
        self,
        ids: Sequence[int],
        settings: LoopSettings,
        prefixes: Prefixes | None = None,
        pipelining: Pipelining | None = None,
    ) -> None:
        """Run tokens behind all others that have run, after restoring a known beginning."""
        start, size, self._logits = self._cached, settings.chunk or self.driver.manifest.chunk, None
        self._ids[start:] = ids
        while self._chunks and self._chunks[-1][0] >= start:  # of tokens that are no longer the session's
            self._chunks.pop()
        self._chunks += [(begin, settings) for begin in range(start, start + len(ids), size)]
        known = 0 if prefixes is None else prefixes.restore(self.driver, 0, ids, settings)
        self._logits = self.driver.advance([ids[known:]], settings, pipelining=pipelining)

    def _keep(self, length: int, cached: int) -> None:
        """Keep the first ``length`` tokens, of which the first ``cached`` stay in the cache. An exception leaves all
        tokens."""
        known = max(self._cached, self._tail.known)
        self._logits, self._tail = None, _Tail(len(self), known)
        self.driver.truncate(0, cached)
        self._tail = _Tail(length, min(known, length))

    @property
    def _cached(self) -> int:
        """The number of tokens in the cache."""
        return int(self.driver.lengths[0])

    def _cached_chunks(self) -> list[tuple[int, LoopSettings]]:
        """Return start and settings of the chunks in the cache."""
        return self._chunks[: bisect_left(self._chunks, self._cached, key=itemgetter(0))]

    def _owed(self) -> list[int]:
        """Return the tokens that are still to run."""
        return self._ids[self._cached : len(self)]

    def _require_tokens(self) -> None:
        if not len(self):
            raise PromptError("the session is empty; append a prompt first")
