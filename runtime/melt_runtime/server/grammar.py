"""JSON by a schema: llguidance says which tokens may come next."""

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
_BLANKS = r" ?|\n {0,16}"  # bounded, so that no model can go on with blanks for ever
_MAX_STATES = 20_000  # of the automaton that a call's grammars share; each takes up to 2 kB
_BASE_WEIGHT = 100  # of any choice's grammar, besides its schema's
_COPY_SHARE = 20  # a choice's copy of a compiled grammar takes this part of it
_MAX_WEIGHT = 100_000  # of all grammars that are alive, about 250 MB
_HEAVY = 1_000  # a schema of this weight takes a tenth of a second, and its turn
_MAX_TURNS = 4  # heavy schemas that may wait for theirs


class Grammars:
    """Makes the constraints of a package's requests; the tokenizer is read once. Raises ArgumentError for a package
    without a tokenizer or end of text, and where llguidance is not installed."""

    def __init__(self, runtime: Runtime):
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
        self._vocabulary = _Vocabulary(runtime.tokenizer, runtime.manifest.vocab_size, self._stop_ids)
        self._tokenizer = self._vocabulary.tokenizer(llguidance)
        self._lock = threading.Lock()
        self._weight = 0  # of all grammars that are alive
        self._returned: deque[int] = deque()  # weights of those that are not any more, perhaps told by a collection
        self._waiting = 0  # heavy schemas that are not compiled yet
        self._turn = threading.Lock()

    def constraint(self, schema: dict[str, Any] | bool) -> JsonConstraint:
        """A constraint for one sequence; raises as ``constraints`` does."""
        return self.constraints(schema, 1)[0]

    def constraints(
        self, schema: dict[str, Any] | bool, count: int, stop_ids: Collection[int] = ()
    ) -> list[JsonConstraint]:
        """Constraints for the sequences of one call, from one compiled grammar. ``stop_ids``: what ends a sequence,
        where it is not the package's own.

        Raises ArgumentError for a schema that llguidance does not take or that is too large, BusyError when the
        grammars of other calls take too much.
        """
        weight = weigh(schema)
        total = weight + count * (_BASE_WEIGHT + weight // _COPY_SHARE)
        if total > _MAX_WEIGHT:
            raise ArgumentError(f"the JSON schema is too large for {count} choices at once; ask for fewer")
        share = self._reserve(total)
        with self._heavy_turn() if weight > _HEAVY else _no_turn():
            matcher = self._compile(schema)
        ends = [i for i in sorted(stop_ids) if i < self._vocabulary.size] or sorted(self._stop_ids)
        copies = [matcher, *(matcher.deep_copy() for _ in range(count - 1))]
        made = [JsonConstraint(one, self._vocabulary, ends, share) for one in copies]
        if not made[0].mask([]).any():
            raise ArgumentError(f"the JSON schema: {_NOTHING}")
        return made

    def _compile(self, schema: dict[str, Any] | bool) -> Any:
        if schema is False:
            raise ArgumentError("the JSON schema: no JSON fits false")
        asked: dict[str, Any] = {} if schema is True else schema
        options = asked.get("x-guidance")
        blanks = {"whitespace_pattern": _BLANKS, **(options if isinstance(options, dict) else {})}
        text = _guarded(lambda: json.dumps({**asked, "x-guidance": blanks}))
        # Without no_forcing, llguidance would have our tokenizer spell text that can only be one, and allow that alone.
        lark = f'%llguidance {{"no_forcing": true}}\nstart: %json {text}'
        make = self._library.LLMatcher
        matcher = _guarded(
            lambda: make(self._tokenizer, make.grammar_from_lark(lark), log_level=0, limits=self._limits)
        )
        _check(matcher, "the JSON schema cannot be used")
        return matcher

    def _reserve(self, weight: int) -> _Share:
        """Counts a grammar's weight as long as the share is alive."""
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
    def _heavy_turn(self) -> Iterator[None]:
        """One heavy schema is compiled at a time."""
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


class JsonConstraint:
    """What one sequence may say so that it becomes JSON by its schema; a ``track.Constraint``."""

    def __init__(self, matcher: Any, vocabulary: _Vocabulary, stop_ids: Sequence[int], share: _Share):
        self._matcher, self._vocabulary, self._stop_ids, self._share = matcher, vocabulary, stop_ids, share
        self._begun = False

    def mask(self, history: Sequence[int]) -> NDArray[np.bool_]:
        """The tokens that may come next; the stop ids once the JSON may end, and they alone once it must."""
        vocabulary, stopped = self._vocabulary, self._matcher.is_stopped()
        if stopped:
            allowed = np.zeros(vocabulary.size, np.bool_)
        else:
            packed = np.frombuffer(_guarded(self._matcher.compute_bitmask), np.uint8)
            allowed = vocabulary.tokens_of(np.unpackbits(packed, bitorder="little").astype(np.bool_), not self._begun)
        _check(self._matcher, "the JSON schema")
        allowed[self._stop_ids] = stopped or self._matcher.is_accepting()
        return allowed

    def accept(self, token: int) -> None:
        """A token was drawn."""
        if token in self._stop_ids:
            return
        _guarded(lambda: self._matcher.consume_token(self._vocabulary.entry(token, not self._begun)))
        self._begun = True
        _check(self._matcher, "the JSON schema")


class _Share:
    """What holds a grammar's weight: it is given back when the last constraint is gone."""

    __slots__ = ("__weakref__",)


class _Vocabulary:
    """The tokens as llguidance reads them: an entry of bytes for each, and another for each token that has other bytes
    where it begins a text. Tokens that a text does not show, and stop ids, are in no JSON."""

    def __init__(self, tokenizer: TextTokenizer, size: int, stop_ids: Collection[int]):
        self.size = size
        of = tokenizer.token_bytes
        shown = [i for i in range(size) if i not in stop_ids and tokenizer.shows(i, skip_special_tokens=True)]
        self._entries = [b""] * size
        self._first = np.arange(size)
        for token in shown:
            self._entries[token] = of.of(token)
            first = of.first(token)
            if first != self._entries[token]:
                self._first[token] = len(self._entries)
                self._entries.append(first)

    def entry(self, token: int, begins: bool) -> int:
        """The entry of a token. ``begins``: it begins the text."""
        return int(self._first[token]) if begins else token

    def tokens_of(self, entries: NDArray[np.bool_], begins: bool) -> NDArray[np.bool_]:
        """Which tokens (size,) are among the entries; those that llguidance leaves out at the end are not."""
        known = np.zeros(len(self._entries), np.bool_)
        known[: len(entries)] = entries[: len(known)]
        return known[self._first] if begins else known[: self.size].copy()

    def tokenizer(self, library: Any) -> Any:
        """llguidance's tokenizer, which has one more entry, for the end of the text."""
        from llguidance._tokenizer import TokenizerWrapper

        silent = [i for i, text in enumerate(self._entries) if not text or text[0] == 0xFF]
        # An entry without text is in no JSON; it needs a name of its own all the same.
        names = [text or b"\xff<%d>" % i for i, text in enumerate(self._entries)]
        return library.LLTokenizer(TokenizerWrapper(_Entries([*names, b"\xff<end>"], [*silent, len(names)])))


class _Entries:
    """A tokenizer as llguidance's wrapper takes it, its last token the end of the text. It is never asked to spell."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int]):
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, len(tokens) - 1

    def __call__(self, text: str | bytes) -> list[int]:
        return []


@contextmanager
def _no_turn() -> Iterator[None]:
    yield


def _guarded(call: Callable[[], Result]) -> Result:
    """What a call of a library gives. Raises ArgumentError for all that it raises; a panic of Rust is no Exception."""
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
    """llguidance's words in one line, without where in our grammar it happened."""
    message = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", message)
    message = re.split(r"\n<|\n +\d+ \| ", message)[0]
    if message.startswith("NoExtension"):
        return _NOTHING
    lines = [line.strip() for line in message.splitlines()]
    text = " ".join(line for line in lines if line.strip("^ "))
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
