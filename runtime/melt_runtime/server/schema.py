"""What a request may say. Fields that nothing here could honour are refused unless they ask for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator

from ..text.stop_strings import MAX_STOP_STRINGS
from .fields import Count, Name, Number, Seconds, Seed, Share, Stop, Strict, Tokens, by_kind, nothing, wrong

_PENALTY = "this server has no penalty by count, so only 0 is possible; repetition_penalty is supported"


class StreamOptions(Strict):
    """What a stream holds beside its tokens."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[None, nothing("streams are not obfuscated; only false is possible", False)] = None


class JsonSchema(Strict):
    """A schema by name; ``strict`` or not, it is kept to."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[
        Annotated[dict[str, Any], Tag("~object")] | Annotated[bool, Tag("~bool")],
        by_kind({dict: "~object", bool: "~bool"}, "a schema is an object, true or false"),
    ] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """Free text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong("the type json_schema comes with json_schema, and nothing else does")
        return self

    @property
    def schema_asked(self) -> dict[str, Any] | bool | None:
        """The schema to keep to; None: free text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


def _no_bias(value: Any) -> None:
    if value is not None and not (isinstance(value, dict) and all(bias == 0 for bias in value.values())):
        raise wrong("tokens cannot be biased here; only {} or biases of 0 are possible")


class Ask(Strict):
    """What completions and chats have in common. ``loops``, ``exit_threshold``, ``min_loops``, ``exit_change``,
    ``top_k``, ``min_p``, ``repetition_penalty``, ``ignore_eos`` and ``max_seconds`` are this server's own."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    seed: Seed | None = None
    stop: Annotated[
        Annotated[None, Tag("~none")]
        | Annotated[Stop, Tag("~text")]
        | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), Tag("~texts")],
        by_kind({type(None): "~none", str: "~text", list: "~texts"}, "stop is text or a list of texts"),
    ] = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    response_format: ResponseFormat | None = None
    loops: Count | None = None
    exit_threshold: Share | None = None
    min_loops: Count | None = None
    exit_change: Number | None = None
    top_k: Annotated[int, Field(lt=1 << 31)] | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    ignore_eos: bool | None = None
    max_seconds: Seconds | None = None
    frequency_penalty: Annotated[None, nothing(_PENALTY, 0, 0.0)] = None
    presence_penalty: Annotated[None, nothing(_PENALTY, 0, 0.0)] = None
    logit_bias: Annotated[None, BeforeValidator(_no_bias)] = None
    # For the records of whoever asks, and for servers that are many; not kept.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Annotated[None, nothing("this server stores no replies; only false is possible", False)] = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _streamed(self) -> Ask:
        if self.stream_options is not None and not self.stream:
            raise wrong("they belong to a stream", "stream_options")
        return self

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def _prompts(value: Sequence[Any]) -> str:
    """Which kind of prompts a list holds, by its first."""
    first = value[0] if value else 0
    return "~texts" if isinstance(first, str) else "~lists" if isinstance(first, list) else "~ids"


class CompletionAsk(Ask):
    """A prompt, or several: text or token ids."""

    prompt: Annotated[
        Annotated[str, Tag("~text")]
        | Annotated[list[str], Field(fail_fast=True), Tag("~texts")]
        | Annotated[Tokens, Tag("~ids")]
        | Annotated[list[Tokens], Field(fail_fast=True), Tag("~lists")],
        by_kind({str: "~text", list: _prompts}, "a prompt is text, token ids, or a list of either"),
    ]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Annotated[None, nothing("prompts are not repeated in replies; only false is possible", False)] = None
    best_of: Count | None = None
    suffix: Annotated[None, nothing("nothing can be put in before a suffix; only null is possible", "")] = None

    @model_validator(mode="after")
    def _all_are_told(self) -> CompletionAsk:
        if self.best_of not in (None, self.n or 1):
            raise wrong("every choice is told, so best_of can only be n", "best_of")
        return self


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
        raise wrong(f"{_PARTS[kind]}, only text is", "type")
    return part


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


def _a_speaker(role: Any) -> Any:
    if role in ("tool", "function"):
        raise wrong("tools are not supported, so nothing speaks in this role")
    return role


class Message(Strict):
    """One turn of a conversation. A message of a reply may be sent back with all its fields."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_a_speaker)]
    content: Annotated[
        Annotated[None, Tag("~none")]
        | Annotated[str, Tag("~text")]
        | Annotated[list[Annotated[TextPart, BeforeValidator(_text_alone)]], Field(fail_fast=True), Tag("~parts")],
        by_kind({type(None): "~none", str: "~text", list: "~parts"}, "content is text or a list of parts"),
    ] = None
    name: str | None = None
    refusal: Annotated[None, nothing("refusals are not supported; only null is possible")] = None
    audio: Annotated[None, nothing("audio is not supported; only null is possible")] = None
    annotations: Annotated[None, nothing("annotations are not supported; only [] is possible", [])] = None
    tool_calls: Annotated[None, nothing("tools are not supported; only [] is possible", [])] = None
    function_call: Annotated[None, nothing("tools are not supported; only null is possible")] = None
    # Other servers' names for what a model thought: null where it did not.
    reasoning: Annotated[None, nothing("reasoning is not supported; only null is possible")] = None
    reasoning_content: Annotated[None, nothing("reasoning is not supported; only null is possible")] = None
    tool_call_id: Annotated[None, nothing("tools are not supported; only null is possible")] = None

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise wrong("it is missing", "content")
        return self

    def plain(self) -> dict[str, str]:
        """As a chat template takes it; developers speak as the system."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatAsk(Ask):
    """A conversation to go on with."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    chat_template_kwargs: dict[str, Any] | None = None  # what the template is given beside the messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[None, nothing("tools are not supported; only [] is possible", [])] = None
    tool_choice: Annotated[None, nothing('tools are not supported; only "none" is possible', "none", "auto")] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[None, nothing("tools are not supported; only [] is possible", [])] = None
    function_call: Annotated[None, nothing('tools are not supported; only "none" is possible', "none", "auto")] = None
    modalities: Annotated[None, nothing('answers are text; only ["text"] is possible', ["text"], [])] = None
    audio: Annotated[None, nothing("audio is not supported; only null is possible")] = None
    prediction: Annotated[None, nothing("predictions are not supported; only null is possible")] = None
    moderation: Annotated[None, nothing("moderation is not supported; only null is possible")] = None
    web_search_options: Annotated[None, nothing("there is no search; only null is possible")] = None
    reasoning_effort: Annotated[
        None, nothing('how much a token is thought over is said by loops; only "none" is possible', "none")
    ] = None
    verbosity: Annotated[None, nothing('verbosity is not supported; only "medium" is possible', "medium")] = None
    prompt_cache_options: Annotated[None, nothing("kept prompts have no options; only null is possible")] = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _agreed(self) -> ChatAsk:
        if self.top_logprobs and not self.logprobs:
            raise wrong("it needs logprobs to be true", "top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise wrong("max_tokens and max_completion_tokens differ; give one", "max_tokens")
        return self
