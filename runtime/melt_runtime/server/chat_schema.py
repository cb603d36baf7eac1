"""The schema of chats: messages, and the body of a chat request."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator

from .fields import Count, Effort, Strict, by_kind, invalid, unsupported
from .schema import RequestBody
from .tool_schema import MAX_CALLS, CallInHistory, Choice, NamedTool, Tool, Tools

_PARTS = {
    "image_url": "images are not supported",
    "input_image": "images are not supported",
    "image": "images are not supported",
    "input_audio": "audio is not supported",
    "audio_url": "audio is not supported",
    "video_url": "videos are not supported",
    "file": "files are not supported",
    "refusal": "refusals are not supported",
}


def _text_alone(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in _PARTS:
        raise invalid(f"{_PARTS[kind]}, only text is", "type")
    return part


class TextPart(Strict):
    """A text part of a message."""

    type: Literal["text"]
    text: str


def _a_speaker(role: Any) -> Any:
    if role == "function":
        raise invalid("function is an old name; the role is tool")
    return role


class Message(Strict):
    """One message of a chat. A reply's message may be sent back with all its fields."""

    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_a_speaker)]
    content: Annotated[
        Annotated[None, Tag("~none")]
        | Annotated[str, Tag("~text")]
        | Annotated[list[Annotated[TextPart, BeforeValidator(_text_alone)]], Field(fail_fast=True), Tag("~parts")],
        by_kind({type(None): "~none", str: "~text", list: "~parts"}, "content is text or a list of parts"),
    ] = None
    name: str | None = None
    refusal: Annotated[None, unsupported("refusals are not supported; only null is possible")] = None
    audio: Annotated[None, unsupported("audio is not supported; only null is possible")] = None
    annotations: Annotated[None, unsupported("annotations are not supported; only [] is possible", [])] = None
    tool_calls: Annotated[list[CallInHistory], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    function_call: Annotated[None, unsupported("it is an old name; give tool_calls")] = None
    reasoning: str | None = None  # some servers' name for the next
    reasoning_content: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise invalid("it is missing", "content")
        if self.role != "assistant":
            for name in ("tool_calls", "reasoning", "reasoning_content"):
                if getattr(self, name):
                    raise invalid("only the assistant has it", name)
        if self.role != "tool" and self.tool_call_id is not None:
            raise invalid("only a tool's message has it", "tool_call_id")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def plain(self) -> dict[str, Any]:
        """Return the message as a dict for the chat template; developers become the system."""
        made: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        reasoning = self.reasoning_content or self.reasoning
        if reasoning:
            made["reasoning_content"] = reasoning
        if self.tool_calls:
            made["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.role == "tool":
            made |= {name: getattr(self, name) for name in ("tool_call_id", "name") if getattr(self, name) is not None}
        return made


class ChatBody(RequestBody):
    """A chat request."""

    prompt_field: ClassVar[str | None] = "messages"
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    chat_template_kwargs: dict[str, Any] | None = None  # further variables for the chat template
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[None, unsupported("it is an old name; give tools", [])] = None
    function_call: Annotated[None, unsupported("it is an old name; give tool_choice", "none", "auto")] = None
    modalities: Annotated[None, unsupported('answers are text; only ["text"] is possible', ["text"], [])] = None
    audio: Annotated[None, unsupported("audio is not supported; only null is possible")] = None
    prediction: Annotated[None, unsupported("predictions are not supported; only null is possible")] = None
    moderation: Annotated[None, unsupported("moderation is not supported; only null is possible")] = None
    web_search_options: Annotated[None, unsupported("there is no search; only null is possible")] = None
    reasoning_effort: Effort = None
    verbosity: Annotated[None, unsupported('verbosity is not supported; only "medium" is possible', "medium")] = None
    prompt_cache_options: Annotated[None, unsupported("kept prompts have no options; only null is possible")] = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _agreed(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise invalid("it needs logprobs to be true", "top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise invalid("max_tokens and max_completion_tokens differ; give one", "max_tokens")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise invalid("two functions have the same name", "tools")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise invalid("it needs tools", "tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise invalid(f"there is no function {self.tool_choice.function.name!r} in tools", "tool_choice")
        return self

    @property
    def limit_field(self) -> str:
        """The field that limits the answer's tokens."""
        return "max_tokens" if self.max_tokens is not None else "max_completion_tokens"

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables that the chat template gets beside messages and tools."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}

    @property
    def offered(self) -> list[Tool]:
        """The tools that the answer may call."""
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools or () if tool.function.name == self.tool_choice.function.name]
        return list(self.tools or ())

    @property
    def must_call(self) -> bool:
        """Whether the answer is a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)
