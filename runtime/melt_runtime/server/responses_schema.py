"""The schema of OpenAI's responses, which become chats."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator

from .chat_schema import ChatBody
from .fields import Count, Effort, Strict, by_kind, invalid, unsupported
from .schema import CommonFields
from .tool_schema import MAX_TOOLS, FunctionName

MAX_ITEMS = 10_000


def _text_only(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind.startswith("input_") and kind != "input_text":
        raise invalid("only text is supported", "type")
    return part


class Part(Strict):
    """A text part of an item."""

    type: Literal["input_text", "output_text", "reasoning_text", "summary_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


_Parts = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[list[Annotated[Part, BeforeValidator(_text_only)]], Field(fail_fast=True), Tag("~parts")],
    by_kind({str: "~text", list: "~parts"}, "it is text or a list of parts"),
]


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class Item(Strict):
    """The fields of all items, of which a reply's may be sent back."""

    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _Parts
    phase: str | None = None


class CallItem(Item):
    """A call of a function in an earlier reply."""

    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str
    namespace: None = None


class OutputItem(Item):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: _Parts


class ReasoningItem(Item):
    """The reasoning of an earlier reply."""

    type: Literal["reasoning"]
    summary: list[Part] | None = None
    content: list[Part] | None = None
    encrypted_content: Annotated[None, unsupported("reasoning is not encrypted here; only null is possible")] = None


_ITEMS: dict[Any, str] = {"function_call": "~call", "function_call_output": "~output", "reasoning": "~reasoning"}


def _item_kind(value: dict[str, Any]) -> str:
    kind = value.get("type")
    return _ITEMS.get(kind, "~message") if isinstance(kind, str) else "~message"


_AnyItem = Annotated[
    Annotated[MessageItem, Tag("~message")]
    | Annotated[CallItem, Tag("~call")]
    | Annotated[OutputItem, Tag("~output")]
    | Annotated[ReasoningItem, Tag("~reasoning")],
    by_kind({dict: _item_kind}, "an item is an object"),
]


class FlatTool(Strict):
    """A function, written without the object around it that chats have."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFlatTool(Strict):
    """A function that must be called."""

    type: Literal["function"]
    name: FunctionName


class TextFormat(Strict):
    """The format of the text: free, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise invalid("the type json_schema needs it", "schema")
        return self


class TextOptions(Strict):
    """The options of the text."""

    format: TextFormat | None = None
    verbosity: Annotated[None, unsupported('verbosity is not supported; only "medium" is possible', "medium")] = None


class ReasoningOptions(Strict):
    """The options of reasoning."""

    effort: Effort = None
    summary: Annotated[None, unsupported("reasoning is returned in full; only null is possible")] = None
    generate_summary: Annotated[None, unsupported("reasoning is returned in full; only null is possible")] = None


_OWN_FIELDS = {  # by those of a chat
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_ENCRYPTED: list[str] = ["reasoning.encrypted_content"]  # agents ask for it of every model


class ResponsesBody(CommonFields):
    """A request for a response. Nothing is stored, so ``store`` has no effect; a reply says so."""

    prompt_field: ClassVar[str | None] = "input"
    input: Annotated[
        Annotated[str, Tag("~text")]
        | Annotated[list[_AnyItem], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True), Tag("~items")],
        by_kind({str: "~text", list: "~items"}, "input is text or a list of items"),
    ]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[
        Annotated[None, Tag("~none")]
        | Annotated[Literal["none", "auto", "required"], Tag("~word")]
        | Annotated[NamedFlatTool, Tag("~named")],
        by_kind({type(None): "~none", str: "~word", dict: "~named"}, 'it is "none", "auto", "required" or a function'),
    ] = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Count | None = None  # of tools that a server runs itself, of which there are none
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: bool | None = None
    previous_response_id: Annotated[None, unsupported("no response is stored; send the whole conversation")] = None
    conversation: Annotated[None, unsupported("no conversation is stored; send all of it as input")] = None
    prompt: Annotated[None, unsupported("no prompt is stored; send it as input")] = None
    background: Annotated[
        None, unsupported("a response comes at once or as a stream; only false is possible", False)
    ] = None
    include: Annotated[None, unsupported("nothing more can be included; only [] is possible", [], _ENCRYPTED)] = None
    truncation: Annotated[
        None, unsupported('a conversation that does not fit is refused; only "disabled" is possible', "disabled")
    ] = None
    top_logprobs: Annotated[None, unsupported("responses have no logprobs; chats and completions have", 0)] = None
    prompt_cache_retention: str | None = None

    def chat(self) -> ChatBody:
        """Return the chat that this request is."""
        own = set(ChatBody.model_fields) & set(CommonFields.model_fields)
        given = {name: getattr(self, name) for name in own if getattr(self, name) is not None}
        given.pop("stream_options", None)
        return ChatBody.model_validate(
            {
                **given,
                "messages": self._messages(),
                "max_tokens": self.max_output_tokens,
                "tools": None if self.tools is None else [_tool(tool) for tool in self.tools],
                "tool_choice": _choice(self.tool_choice),
                "parallel_tool_calls": self.parallel_tool_calls,
                "response_format": _response_format(None if self.text is None else self.text.format),
                "chat_template_kwargs": self.chat_template_kwargs,
                "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
            }
        )

    @staticmethod
    def own_field(name: str) -> str:
        """Return the field that a refusal of the chat is about. A message may be of several items: ``input``."""
        first, _, rest = name.partition(".")
        if first == "messages":
            return "input"
        if first in ("tools", "tool_choice"):
            return name.replace(".function", "", 1)
        own = _OWN_FIELDS.get(first, first)
        return ".".join([own, rest.removeprefix("json_schema.")]) if rest else own

    def _messages(self) -> list[dict[str, Any]]:
        """Return the conversation as a chat's messages: reasoning, text and calls of one turn are one message."""
        made: list[dict[str, Any]] = []
        if self.instructions:
            made.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*made, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, OutputItem):
                made.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            elif isinstance(item, MessageItem) and item.role != "assistant":
                made.append({"role": item.role, "content": _text(item.content)})
            else:
                _add_to_turn(made, item)
        return made


def _add_to_turn(messages: list[dict[str, Any]], item: MessageItem | CallItem | ReasoningItem) -> None:
    """Add to the assistant's message at the end, or begin one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    turn = messages[-1]
    if isinstance(item, ReasoningItem):
        turn["reasoning_content"] = turn.get("reasoning_content", "") + _text(item.content or item.summary or [])
    elif isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    else:
        turn["content"] = (turn["content"] or "") + _text(item.content)


def _tool(tool: FlatTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _choice(choice: str | NamedFlatTool | None) -> Any:
    if isinstance(choice, NamedFlatTool):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _response_format(form: TextFormat | None) -> dict[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema_}}
