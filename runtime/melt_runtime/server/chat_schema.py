"""The schema of chats: messages, and the body of a chat request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator

from .fields import Count, Strict, by_kind, invalid, unsupported
from .schema import RequestBody

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
    if role in ("tool", "function"):
        raise invalid("tools are not supported, so nothing speaks in this role")
    return role


class Message(Strict):
    """One message of a chat. A reply's message may be sent back with all its fields."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_a_speaker)]
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
    tool_calls: Annotated[None, unsupported("tools are not supported; only [] is possible", [])] = None
    function_call: Annotated[None, unsupported("tools are not supported; only null is possible")] = None
    # Other servers' fields for reasoning; null without it.
    reasoning: Annotated[None, unsupported("reasoning is not supported; only null is possible")] = None
    reasoning_content: Annotated[None, unsupported("reasoning is not supported; only null is possible")] = None
    tool_call_id: Annotated[None, unsupported("tools are not supported; only null is possible")] = None

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise invalid("it is missing", "content")
        return self

    def plain(self) -> dict[str, str]:
        """Return the message as a dict for the chat template; developers become the system."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(RequestBody):
    """A chat request."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    chat_template_kwargs: dict[str, Any] | None = None  # further variables for the chat template
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[None, unsupported("tools are not supported; only [] is possible", [])] = None
    tool_choice: Annotated[None, unsupported('tools are not supported; only "none" is possible', "none", "auto")] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[None, unsupported("tools are not supported; only [] is possible", [])] = None
    function_call: Annotated[None, unsupported('tools are not supported; only "none" is possible', "none", "auto")] = (
        None
    )
    modalities: Annotated[None, unsupported('answers are text; only ["text"] is possible', ["text"], [])] = None
    audio: Annotated[None, unsupported("audio is not supported; only null is possible")] = None
    prediction: Annotated[None, unsupported("predictions are not supported; only null is possible")] = None
    moderation: Annotated[None, unsupported("moderation is not supported; only null is possible")] = None
    web_search_options: Annotated[None, unsupported("there is no search; only null is possible")] = None
    reasoning_effort: Annotated[
        None, unsupported('loops sets the depth of thought; only "none" is possible', "none")
    ] = None
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
        return self
