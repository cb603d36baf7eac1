"""How models write calls of functions, and which way a package's model does, as its chat template shows.

A format is what stands around calls: its ``opener`` before each of them or before a list, and the keys of a call's JSON
object. Add a format here, and to ``FORMATS`` in the order in which templates are searched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..text.tokenizer import TextTokenizer

THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls.

    ``opener``: the text before calls; "": the reply is nothing but calls. ``closer``: the text after each call.
    ``shape``: "each": an object after each opener; "list": a JSON list of objects; "chain": objects with a semicolon
    between them; "named": the name, ``separator`` and the arguments' object; "python": a list of Python calls.
    ``arguments``: the key of the arguments. ``markers``: texts that may be special tokens. ``marks``: groups of texts;
    a chat template of such a model contains all of one group. ``id_length``: of a call's id, where the template is
    particular about it.
    """

    name: str
    shape: Literal["each", "list", "chain", "named", "python"]
    marks: tuple[tuple[str, ...], ...] = ()
    opener: str = ""
    closer: str = ""
    arguments: str = "arguments"
    separator: str = ""
    markers: tuple[str, ...] = ()
    id_length: int | None = None

    def written_by(self, source: str) -> bool:
        """Return whether models with this chat template write calls in this format."""
        return any(all(mark in source for mark in group) for group in self.marks)


HERMES = ToolFormat(
    "hermes",
    "each",
    marks=(("<tool_call>",),),
    opener="<tool_call>",
    closer="</tool_call>",
    markers=("<tool_call>", "</tool_call>"),
)
_MISTRAL_NAMED = ToolFormat(
    "mistral",
    "named",
    marks=(("[TOOL_CALLS]", "[ARGS]"),),
    opener="[TOOL_CALLS]",
    separator="[ARGS]",
    markers=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    id_length=9,
)
_MISTRAL = ToolFormat(
    "mistral list",
    "list",
    marks=(("[TOOL_CALLS]",),),
    opener="[TOOL_CALLS]",
    markers=("[TOOL_CALLS]",),
    id_length=9,
)
_LLAMA = ToolFormat(
    "llama", "chain", marks=(("<|python_tag|>",), ("ipython",)), arguments="parameters", markers=("<|python_tag|>",)
)
_PYTHONIC = ToolFormat("pythonic", "python", marks=(("[func_name1(",), ("[func1(",)))
FORMATS = (_MISTRAL_NAMED, _MISTRAL, HERMES, _PYTHONIC, _LLAMA)
_FOREIGN = ("<function=", "<arg_key>")  # in templates of models that also write <tool_call>, but no JSON in it
# Where a call is required of a model that writes Python, it writes JSON, to which a grammar can hold it.
JSON_LIST = ToolFormat("json list", "list")


@dataclass(frozen=True)
class ModelFormat:
    """How a package's model writes calls. ``native``: whether its chat template knows tools; otherwise they are
    explained in a message. ``thinks``: whether it writes its reasoning between <think> and </think>."""

    tools: ToolFormat
    native: bool
    thinks: bool


def model_format(tokenizer: TextTokenizer) -> ModelFormat:
    """Return how a model writes calls, by its chat template."""
    source = tokenizer.template_source(tools=True) or ""
    both = source + (tokenizer.template_source() or "")
    thinks = THOUGHT in both or THINK in both
    if "tools" in source and not any(mark in source for mark in _FOREIGN):
        found = next((one for one in FORMATS if one.written_by(source)), None)
        if found is not None:
            return ModelFormat(found, True, thinks)
    return ModelFormat(HERMES, False, thinks)
