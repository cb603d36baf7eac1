"""The messages and variables that a chat template is given: with tools as the template knows them, or explained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import PackageError, PromptError
from ..text.tokenizer import TextTokenizer
from .tool_formats import THINK, ModelFormat
from .tool_schema import Tool

_EXPLANATION = """You can call these functions, each described by a JSON object:
<tools>
{tools}
</tools>
To call one, write its name and arguments as a JSON object between tags:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>
Write nothing after a call. What the function returns then comes to you between <tool_response> tags."""

_END_OF_TOOLS = "</tools>"


def rendered(
    tokenizer: TextTokenizer,
    format: ModelFormat,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool],
    variables: Mapping[str, Any],
) -> str:
    """Return the prompt text of a chat, whose answer may call ``tools``. ``variables``: further ones for the template.

    Raises ArgumentError, PromptError, PackageError.
    """
    if format.native:
        given = {"tools": [tool.plain() for tool in tools]} if tools else {}
        return tokenizer.render_chat(messages, **{**given, **variables})
    messages = _without_tools(messages)
    if not tools:
        return tokenizer.render_chat(messages, **variables)
    explanation = explained(tools)
    with suppress(PromptError, PackageError):  # many templates refuse the role system, and some leave it out
        text = tokenizer.render_chat(_with_system(messages, explanation), **variables)
        if _END_OF_TOOLS in text:
            return text
    return tokenizer.render_chat(_before_first(messages, explanation), **variables)


def thinking(text: str, format: ModelFormat) -> bool | None:
    """Return whether the answer to a prompt begins in the midst of reasoning; None: the model does not reason aloud."""
    return text.rstrip().endswith(THINK) if format.thinks else None


def explained(tools: Sequence[Tool]) -> str:
    """Return the text that explains tools to a model whose template does not."""
    return _EXPLANATION.format(tools="\n".join(json.dumps(tool.plain(), ensure_ascii=False) for tool in tools))


def _without_tools(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write calls and their results into texts of the roles that every template knows."""
    made: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if made and made[-1].get("results"):
                made[-1]["content"] += f"\n{content}"
                continue
            made.append({"role": "user", "content": content, "results": True})
            continue
        for one in message.get("tool_calls", ()):
            function = json.dumps(one["function"], ensure_ascii=False)
            content += ("\n" if content else "") + f"<tool_call>\n{function}\n</tool_call>"
        made.append({name: value for name, value in message.items() if name != "tool_calls"} | {"content": content})
    return [{name: value for name, value in message.items() if name != "results"} for message in made]


def _with_system(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    first, *rest = messages
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{text}".strip()}, *rest]


def _before_first(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    first, *rest = messages
    return [{**first, "content": f"{text}\n\n{first['content']}".strip()}, *rest]
