"""JSON by a schema: llguidance says which tokens may come next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..runtime import Runtime

_BLANKS: Any = {"whitespace_pattern": r" ?|\n {0,16}"}  # bounded, so that no model can go on with blanks for ever


class Grammars:
    """Makes the constraints of a package's requests; the tokenizer is read once. Raises ArgumentError for a package
    without a tokenizer or end of text, and where llguidance is not installed."""

    def __init__(self, runtime: Runtime):
        try:
            import llguidance
        except ImportError as error:
            raise ArgumentError("JSON output needs llguidance: pip install 'melt-export[serve]'") from error
        if runtime.codec is None or not runtime.stop_ids:
            raise ArgumentError("JSON output needs a tokenizer and an end-of-text token, and the package lacks one")
        self._library, self._vocab = llguidance, runtime.manifest.vocab_size
        self._stop_ids = sorted(runtime.stop_ids)
        self._tokenizer = self._read(runtime)

    def _read(self, runtime: Runtime) -> Any:
        assert runtime.codec is not None
        try:
            return self._library.LLTokenizer(
                runtime.codec.tokenizer.to_str(), n_vocab=self._vocab, eos_token=self._stop_ids
            )
        except ValueError:  # a decoder that it does not know: the bytes of each token, taken alone
            from llguidance._tokenizer import TokenizerWrapper

            return self._library.LLTokenizer(
                TokenizerWrapper(_Alone(runtime, self._stop_ids[0])), n_vocab=self._vocab, eos_token=self._stop_ids
            )

    def constraint(self, schema: dict[str, Any] | bool) -> JsonConstraint:
        """A constraint for one sequence. Raises ArgumentError for a schema that llguidance does not take."""
        try:
            grammar = self._library.LLMatcher.grammar_from_json_schema(json.dumps(schema), _BLANKS)
            matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"the JSON schema cannot be used: {error}") from error
        if matcher.is_error():
            raise ArgumentError(f"the JSON schema cannot be used: {matcher.get_error().splitlines()[0]}")
        return JsonConstraint(matcher, self._vocab, self._stop_ids)


class JsonConstraint:
    """What one sequence may say so that it becomes JSON by its schema; a ``track.Constraint``."""

    def __init__(self, matcher: Any, vocab: int, stop_ids: Sequence[int]):
        self._matcher, self._vocab, self._stop_ids = matcher, vocab, list(stop_ids)

    def mask(self, history: Sequence[int]) -> NDArray[np.bool_]:
        """The tokens that may come next; the stop ids once the JSON may end, and they alone once it must."""
        allowed = np.zeros(self._vocab, np.bool_)
        if not self._matcher.is_stopped():
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
            found = bits[: self._vocab].astype(np.bool_)
            allowed[: len(found)] = found
        self._check()
        allowed[self._stop_ids] = self._matcher.is_stopped() or self._matcher.is_accepting()
        return allowed

    def accept(self, token: int) -> None:
        """A token was drawn."""
        if token not in self._stop_ids:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ArgumentError(f"the JSON schema: {self._matcher.get_error().splitlines()[0]}")


class _Alone:
    """A tokenizer as llguidance's wrapper takes it, each token with the bytes that it has alone."""

    bos_token_id = None

    def __init__(self, runtime: Runtime, eos: int):
        codec = runtime.codec
        assert codec is not None
        self.eos_token_id, self._codec = eos, codec
        texts = [codec.decode([i]).encode() for i in range(runtime.manifest.vocab_size)]
        self.special_token_ids = [i for i, text in enumerate(texts) if not text]
        # A token without text may never be part of the JSON; it needs a name of its own all the same.
        self.tokens = [text or f"\xff<{i}>".encode("latin-1") for i, text in enumerate(texts)]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._codec.encode(text, add_special_tokens=False)
