"""JSON output and calls of functions by their schemas, enforced with llguidance."""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, BusyError
from ..runtime import Runtime
from ..text.tokenizer import TextTokenizer
from .schema_weight import weigh

Result = TypeVar("Result")

_NOTHING = "no JSON fits it that the tokenizer can write"
_BLANKS = r" ?|\n {0,16}"  # bounded, so that a model cannot continue with blanks for ever
_MAX_STATES = 20_000  # of the automaton shared by a call's grammars; each takes up to 2 kB
_BASE_WEIGHT = 100  # per choice, besides its schema's weight
_COPY_SHARE = 20  # each further choice's copy weighs this fraction of the grammar
_MAX_WEIGHT = 100_000  # of all live grammars, about 250 MB
_HEAVY = 1_000  # above this, compiling takes over 0.1 s and waits for its turn
_MAX_TURNS = 4  # heavy schemas that may wait for their turn


class Budget:
    """The room that all live grammars share. Raises BusyError if other calls' grammars take it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._weight = 0  # of all live grammars
        self._returned: deque[int] = deque()  # weights of freed grammars; the garbage collector may append any time
        self._waiting = 0  # heavy schemas waiting to be compiled
        self._turn = threading.Lock()

    def reserve(self, weight: int) -> _Share:
        """Count a grammar's weight while the returned share is alive."""
        with self._lock:
            while self._returned:
                self._weight -= self._returned.popleft()
            if self._weight + weight > _MAX_WEIGHT:
                raise BusyError("the JSON schemas of other calls take all the room there is; try again", 1.0)
            self._weight += weight
        share = _Share()
        weakref.finalize(share, self._returned.append, weight).atexit = False
        return share

    @contextmanager
    def heavy_turn(self) -> Iterator[None]:
        """Wait to compile a heavy schema; one is compiled at a time."""
        with self._lock:
            if self._waiting >= _MAX_TURNS:
                raise BusyError(f"{self._waiting} large JSON schemas are being compiled; try again", 1.0)
            self._waiting += 1
        try:
            with self._turn:
                yield
        finally:
            with self._lock:
                self._waiting -= 1


class Grammars:
    """A factory of constraints for a package's requests.

    ``shown``: special tokens whose text grammars may spell. ``budget``: shared with other factories. Raises
    ArgumentError for a package without tokenizer or end token, or without llguidance.
    """

    def __init__(self, runtime: Runtime, shown: Collection[int] = (), budget: Budget | None = None):
        try:
            import llguidance
        except ImportError as error:
            raise ArgumentError("JSON output needs llguidance: pip install 'melt-export[serve]'") from error
        ends = runtime.stop_ids or runtime.chat_stop_ids
        if runtime.tokenizer is None or not ends:
            raise ArgumentError("JSON output needs a tokenizer and an end-of-text token, and the package lacks one")
        self._library = llguidance
        self._limits = llguidance.LLParserLimits(max_lexer_states=_MAX_STATES, verbose_errors=False)
        self._stop_ids = frozenset(i for i in ends if i < runtime.manifest.vocab_size)
        self._vocabulary = _Vocabulary(runtime.tokenizer, runtime.manifest.vocab_size, self._stop_ids, shown)
        self._tokenizer = self._vocabulary.tokenizer(llguidance)
        self._budget = budget or Budget()

    def constraint(self, schema: dict[str, Any] | bool) -> JsonConstraint:
        """Make a constraint for one sequence. Raises as ``constraints`` does."""
        return self.constraints(schema, 1)[0]

    def constraints(
        self, schema: dict[str, Any] | bool, count: int, stop_ids: Collection[int] = (), begun: Sequence[bool] = ()
    ) -> list[JsonConstraint]:
        """Make constraints for the sequences of one call, from one compiled grammar.

        ``stop_ids``: the ids that end a sequence, if not the package's. ``begun``: per sequence, whether its text
        continues a prompt's (default: no). Raises ArgumentError for a schema that is too
        large or that llguidance refuses, BusyError if other calls' grammars take all room.
        """
        # Without no_forcing, llguidance would force the tokenizer's spelling of determined text.
        return self.by_lark(
            lambda: f'%llguidance {{"no_forcing": true}}\nstart: {json_rule(schema)}',
            weigh(schema),
            count,
            stop_ids,
            begun,
        )

    def by_lark(
        self,
        grammar: Callable[[], str],
        weight: int,
        count: int,
        stop_ids: Collection[int] = (),
        begun: Sequence[bool] = (),
    ) -> list[JsonConstraint]:
        """Make constraints as ``constraints`` does, from the Lark grammar that ``grammar`` writes. ``weight``: of its
        schemas."""
        total = weight + count * (_BASE_WEIGHT + weight // _COPY_SHARE)
        if total > _MAX_WEIGHT:
            raise ArgumentError(f"the JSON schema is too large for {count} choices at once; ask for fewer")
        share = self._budget.reserve(total)
        with self._budget.heavy_turn() if weight > _HEAVY else _no_turn():
            matcher = self._compile(grammar())
        ends = [i for i in sorted(stop_ids) if i < self._vocabulary.size] or sorted(self._stop_ids)
        copies = [matcher, *(matcher.deep_copy() for _ in range(count - 1))]
        begins = [not one for one in begun] or [True] * count
        made = [
            JsonConstraint(one, self._vocabulary, ends, share, first) for one, first in zip(copies, begins, strict=True)
        ]
        if not made[0].mask([]).any():
            raise ArgumentError(f"the JSON schema: {_NOTHING}")
        return made

    def _compile(self, lark: str) -> Any:
        make = self._library.LLMatcher
        matcher = _guarded(
            lambda: make(self._tokenizer, make.grammar_from_lark(lark), log_level=0, limits=self._limits)
        )
        _check(matcher, "the JSON schema cannot be used")
        return matcher


def json_rule(schema: dict[str, Any] | bool) -> str:
    """Return the Lark rule of JSON by a schema. Raises ArgumentError."""
    if schema is False:
        raise ArgumentError("the JSON schema: no JSON fits false")
    asked: dict[str, Any] = {} if schema is True else schema
    options = asked.get("x-guidance")
    blanks = {"whitespace_pattern": _BLANKS, **(options if isinstance(options, dict) else {})}
    return "%json " + _guarded(lambda: json.dumps({**asked, "x-guidance": blanks}))


class JsonConstraint:
    """A Constraint that makes one sequence JSON by its schema. ``begins``: whether its first token begins a text."""

    def __init__(
        self, matcher: Any, vocabulary: _Vocabulary, stop_ids: Sequence[int], share: _Share, begins: bool = True
    ):
        self._matcher, self._vocabulary, self._stop_ids, self._share = matcher, vocabulary, stop_ids, share
        self._begun = not begins

    def mask(self, history: Sequence[int]) -> NDArray[np.bool_]:
        """Return the tokens that may come next: with the stop ids once the JSON may end, only these once it must."""
        return self._mask(not self._begun)

    def mask_ahead(self, ahead: Sequence[int]) -> NDArray[np.bool_] | None:
        """Return the tokens that may come after ``ahead``; None if these are not allowed themselves."""
        entries = [self._vocabulary.entry(token, not (self._begun or at)) for at, token in enumerate(ahead)]
        taken = _guarded(lambda: self._matcher.try_consume_tokens(entries))
        try:
            return self._mask(begins=False) if taken == len(entries) else None
        finally:
            if taken:
                _guarded(lambda: self._matcher.rollback(taken))

    def _mask(self, begins: bool) -> NDArray[np.bool_]:
        vocabulary, stopped = self._vocabulary, self._matcher.is_stopped()
        if stopped:
            allowed = np.zeros(vocabulary.size, np.bool_)
        else:
            packed = np.frombuffer(_guarded(self._matcher.compute_bitmask), np.uint8)
            allowed = vocabulary.tokens_of(np.unpackbits(packed, bitorder="little").astype(np.bool_), begins)
        _check(self._matcher, "the JSON schema")
        allowed[self._stop_ids] = stopped or self._matcher.is_accepting()
        return allowed

    def accept(self, token: int) -> None:
        """Record a sampled token."""
        if token in self._stop_ids:
            return
        _guarded(lambda: self._matcher.consume_token(self._vocabulary.entry(token, not self._begun)))
        self._begun = True
        _check(self._matcher, "the JSON schema")


class _Share:
    """A reference to a grammar's weight, which is returned when the last constraint is freed."""

    __slots__ = ("__weakref__",)


class _Vocabulary:
    """The tokens as llguidance reads them: bytes per token, and a second entry if a token has other bytes at a text's
    start.

    Tokens without text and stop ids occur in no JSON. ``spelled``: special tokens that have text nevertheless.
    """

    def __init__(self, tokenizer: TextTokenizer, size: int, stop_ids: Collection[int], spelled: Collection[int] = ()):
        self.size = size
        of = tokenizer.token_bytes
        shown = [i for i in range(size) if i not in stop_ids and (i in spelled or tokenizer.shows(i, True))]
        self._entries = [b""] * size
        self._first = np.arange(size)
        for token in shown:
            self._entries[token] = of.of(token)
            first = of.first(token)
            if first != self._entries[token]:
                self._first[token] = len(self._entries)
                self._entries.append(first)

    def entry(self, token: int, begins: bool) -> int:
        """Return a token's entry. ``begins``: whether it starts the text."""
        return int(self._first[token]) if begins else token

    def tokens_of(self, entries: NDArray[np.bool_], begins: bool) -> NDArray[np.bool_]:
        """Return the tokens (size,) among the entries. llguidance may omit entries at the end."""
        known = np.zeros(len(self._entries), np.bool_)
        known[: len(entries)] = entries[: len(known)]
        return known[self._first] if begins else known[: self.size].copy()

    def tokenizer(self, library: Any) -> Any:
        """Make llguidance's tokenizer, with one more entry for the end of text."""
        from llguidance._tokenizer import TokenizerWrapper

        silent = [i for i, text in enumerate(self._entries) if not text or text[0] == 0xFF]
        # Entries without text occur in no JSON, but need distinct names.
        names = [text or b"\xff<%d>" % i for i, text in enumerate(self._entries)]
        return library.LLTokenizer(TokenizerWrapper(_Entries([*names, b"\xff<end>"], [*silent, len(names)])))


class _Entries:
    """A tokenizer for llguidance's wrapper; the last token is the end of text. It is never asked to encode."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int]):
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, len(tokens) - 1

    def __call__(self, text: str | bytes) -> list[int]:
        return []


@contextmanager
def _no_turn() -> Iterator[None]:
    yield


def _guarded(call: Callable[[], Result]) -> Result:
    """Call a library. Raises ArgumentError for any error, including Rust panics, which are BaseExceptions."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ArgumentError(f"the JSON schema cannot be used: {_reason(str(error))}") from error


def _check(matcher: Any, what: str) -> None:
    if matcher.is_error():
        raise ArgumentError(f"{what}: {_reason(matcher.get_error())}")


def _reason(message: str) -> str:
    """Return llguidance's message in one line, without positions in our grammar."""
    message = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", message)
    message = re.split(r"\n<|\n +\d+ \| ", message)[0]
    if message.startswith("NoExtension"):
        return _NOTHING
    lines = [line.strip() for line in message.splitlines()]
    text = " ".join(line for line in lines if line.strip("^ "))
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
