"""The constraints of a call's choices: JSON by a schema, and calls of functions by theirs."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import Any

from ..errors import ArgumentError
from ..runtime import Runtime
from ..sampling.constraint import Constraint
from ..text.text_before import text_before
from .chat_schema import ChatBody
from .grammar import Budget, Grammars, json_rule
from .reply_parser import Reading
from .schema import RequestBody
from .schema_weight import weigh
from .tool_grammar import calls_grammar, thought_first


class Constraints:
    """Makes constraints for a package's calls. What compiles them is made at the first use."""

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self._lock = threading.Lock()
        self._budget = Budget()
        self._factories: dict[frozenset[int], Grammars] = {}  # by the special tokens that replies may spell

    def of(
        self, call: RequestBody, reading: Reading | None, prompts: Sequence[Sequence[int]], stop_ids: Collection[int]
    ) -> Sequence[Constraint | None]:
        """Return the constraint of each choice. ``prompts``: the tokens that each choice continues.

        Raises ArgumentError for a schema that cannot be used, BusyError. If calls are only allowed and their functions'
        schemas cannot be used, they are not held to them.
        """
        count = len(prompts)
        schema = None if call.response_format is None else call.response_format.schema_asked
        if isinstance(call, ChatBody) and reading is not None and call.offered:
            try:
                made = self._calls(call, reading, schema, prompts, stop_ids)
            except ArgumentError:
                if call.must_call or schema is not None:
                    raise
                made = None
            return [None] * count if made is None else made
        if schema is None:
            return [None] * count
        begun = self._begun(prompts)
        if reading is not None and reading.thinking:
            grammars = self._grammars(reading)
            return grammars.by_lark(lambda: thought_first(schema, json_rule), weigh(schema), count, stop_ids, begun)
        return self._grammars(None).constraints(schema, count, stop_ids, begun)

    def _calls(
        self,
        call: ChatBody,
        reading: Reading,
        answer: dict[str, Any] | bool | None,
        prompts: Sequence[Sequence[int]],
        stop_ids: Collection[int],
    ) -> Sequence[Constraint] | None:
        def grammar() -> str | None:
            return calls_grammar(
                reading.format,
                call.offered,
                required=call.must_call,
                several=call.parallel_tool_calls is not False,
                thinking=reading.thinking,
                answer=answer,
                json_rule=json_rule,
            )

        weight = weigh([tool.function.schema_of_arguments for tool in call.offered] + [answer])
        lark = grammar()
        if lark is None:
            return None
        grammars = self._grammars(reading)
        return grammars.by_lark(lambda: lark, weight, len(prompts), stop_ids, self._begun(prompts))

    def _begun(self, prompts: Sequence[Sequence[int]]) -> list[bool]:
        """Return whether the text of each choice continues text of its prompt."""
        tokenizer = self._runtime.tokenizer
        return [tokenizer is not None and bool(text_before(tokenizer, prompt).tokens) for prompt in prompts]

    def _grammars(self, reading: Reading | None) -> Grammars:
        tokenizer = self._runtime.tokenizer
        shown = frozenset[int]() if reading is None or tokenizer is None else reading.shown(tokenizer)
        with self._lock:
            if shown not in self._factories:
                self._factories[shown] = Grammars(self._runtime, shown, self._budget)
            return self._factories[shown]
