"""Grammars (llguidance's Lark) that hold a reply's calls to their functions' schemas."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from .tool_formats import JSON_LIST, THINK, THOUGHT, ToolFormat
from .tool_schema import Tool

_BLANK = r"/[ \n\r\t]{0,4}/"
_ANY = r"/(.|\n)*/"


def output_format(format: ToolFormat, required: bool) -> ToolFormat:
    """Return the format in which calls are written: where they are required, one that a grammar can hold them to."""
    return JSON_LIST if required and format.shape == "python" else format


def calls_grammar(
    format: ToolFormat,
    tools: Sequence[Tool],
    *,
    required: bool,
    several: bool,
    thinking: bool | None,
    answer: dict[str, Any] | bool | None,
    json_rule: Callable[[dict[str, Any] | bool], str],
) -> str | None:
    """Return a grammar of replies that call some of the tools; None where text and calls cannot be told apart while
    they are written.

    ``required``: the reply is one call, or ``several``. ``thinking``: as in ``Reading``. ``answer``: the schema of a
    reply that calls nothing; None: any text. ``json_rule``: makes the rule of JSON by a schema.
    """
    objects = [_object(format, tool, json_rule) for tool in tools]
    lines = [f"tool_{index}: {one}" for index, one in enumerate(objects)]
    lines.append("tool: " + " | ".join(f"tool_{index}" for index in range(len(tools))))
    lines += [f"blank: {_BLANK}", f"ANY: {_ANY}"]
    calls = _calls(format, several)
    if required:
        start = calls
    elif answer is not None:
        start = f"{calls} | answer"
        lines.append(f"answer: {json_rule(answer)}")
    elif format.opener:
        inner = _after_opener(format)
        lines.append(f"opens[lazy]: ANY {_quoted(format.opener)}")
        start = f"(opens {inner})* ANY" if several else f"(opens {inner})? ANY"
    else:
        return None
    if thinking is not None and (required or answer is not None):
        opening = "" if thinking else _quoted(THINK)
        lines.append(f"thought[lazy]: {opening} ANY {_quoted(THOUGHT)}")
        start = f"thought blank ({start})" if thinking else f"(thought blank)? ({start})"
    return "\n".join(['%llguidance {"no_forcing": true}', f"start: {start}", *lines])


def thought_first(answer: dict[str, Any] | bool, json_rule: Callable[[dict[str, Any] | bool], str]) -> str:
    """Return a grammar of the rest of a reasoning that has begun, and JSON after it."""
    return "\n".join(
        [
            '%llguidance {"no_forcing": true}',
            "start: thought blank answer",
            f"thought[lazy]: ANY {_quoted(THOUGHT)}",
            f"answer: {json_rule(answer)}",
            f"blank: {_BLANK}",
            f"ANY: {_ANY}",
        ]
    )


def _calls(format: ToolFormat, several: bool) -> str:
    """Return the rule of one call or several, and nothing else."""
    if format.shape == "list":
        inner = 'tool ("," blank tool)*' if several else "tool"
        return f'{_quoted(format.opener)} "[" {inner} "]"'
    if format.shape == "chain":
        return 'tool ("; " tool)*' if several else "tool"
    one = f"{_quoted(format.opener)} {_after_opener(format)}"
    return f"{one} (blank {one})* blank" if several else one  # models like to end with a new line


def _after_opener(format: ToolFormat) -> str:
    if format.shape == "list":
        return 'blank "[" tool ("," blank tool)* "]"'
    if format.shape == "each":
        return f"blank tool blank {_quoted(format.closer)}"
    return "tool"


def _object(format: ToolFormat, tool: Tool, json_rule: Callable[[dict[str, Any] | bool], str]) -> str:
    """Return the rule of a call of one function."""
    arguments = json_rule(tool.function.schema_of_arguments)
    if format.shape == "named":
        return f"{_quoted(tool.function.name + format.separator)} {arguments}"
    head = f'{{"name": {json.dumps(tool.function.name)}, "{format.arguments}": '
    return f'{_quoted(head)} {arguments} "}}"'


def _quoted(text: str) -> str:
    """Return a Lark string; "" for no text."""
    return json.dumps(text) if text else ""
