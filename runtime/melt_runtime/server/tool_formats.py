"""How models write calls of functions, and which way a package's model does, as its chat template shows.

A format is what stands around calls: its ``opener`` before each of them or before a list, and the keys of a call's JSON
object. Add a format here, and to ``FORMATS`` in the order in which templates are searched.
"""

from __future__ import annotations

import re
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
    ``arguments``: the key of the arguments. ``markers``: texts that may be special tokens. ``mark``: what a chat
    template of such a model contains. ``id_length``: of a call's id, where the template is particular about it.
    """

    name: str
    shape: Literal["each", "list", "chain", "named", "python"]
    mark: re.Pattern[str]
    opener: str = ""
    closer: str = ""
    arguments: str = "arguments"
    separator: str = ""
    markers: tuple[str, ...] = ()
    id_length: int | None = None


HERMES = ToolFormat(
    "hermes", "each", re.compile(r"<tool_call>(?!\\n<function=|\n<function=)"), "<tool_call>", "</tool_call>",
    markers=("<tool_call>", "</tool_call>"),
)  # fmt: skip
_MISTRAL_NAMED = ToolFormat(
    "mistral", "named", re.compile(r"\[TOOL_CALLS\](?s:.)*\[ARGS\]"), "[TOOL_CALLS]", separator="[ARGS]",
    markers=("[TOOL_CALLS]", "[ARGS]"), id_length=9,
)  # fmt: skip
_MISTRAL = ToolFormat(
    "mistral list", "list", re.compile(r"\[TOOL_CALLS\]"), "[TOOL_CALLS]", markers=("[TOOL_CALLS]",), id_length=9
)
_LLAMA = ToolFormat(
    "llama", "chain", re.compile(r'<\|python_tag\|>|["\']parameters["\']: '), arguments="parameters",
    markers=("<|python_tag|>",),
)  # fmt: skip
_PYTHONIC = ToolFormat("pythonic", "python", re.compile(r"\[func_name1\(|\[func1\("))
FORMATS = (_MISTRAL_NAMED, _MISTRAL, HERMES, _PYTHONIC, _LLAMA)
# Where a call is required of a model that writes Python, it writes JSON, to which a grammar can hold it.
JSON_LIST = ToolFormat("json list", "list", re.compile(r"(?!)"))


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
    if re.search(r"\btools\b", source):
        found = next((one for one in FORMATS if one.mark.search(source)), None)
        if found is not None:
            return ModelFormat(found, True, thinks)
    return ModelFormat(HERMES, False, thinks)
