"""The schema of request bodies that all calls share, and of completions.

Unsupported fields are refused unless they request nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag, model_validator

from ..text.stop_strings import MAX_STOP_STRINGS
from .fields import (
    MOST,
    Count,
    Name,
    Number,
    Seconds,
    Seed,
    Share,
    Stop,
    Strict,
    Tokens,
    by_kind,
    invalid,
    prompt_kind,
    unsupported,
)

_MAX_BIASES = 16_384  # tokens in a logit_bias
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Strict):
    """The options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[None, unsupported("streams are not obfuscated; only false is possible", False)] = (
        None
    )


class JsonSchema(Strict):
    """A named schema; it is always enforced, ``strict`` or not."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[
        Annotated[dict[str, Any], Tag("~object")] | Annotated[bool, Tag("~bool")],
        by_kind({dict: "~object", bool: "~bool"}, "a schema is an object, true or false"),
    ] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The output format: free text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise invalid("the type json_schema comes with json_schema, and nothing else does")
        return self

    @property
    def schema_asked(self) -> dict[str, Any] | bool | None:
        """The schema to enforce; None for free text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class CommonFields(Strict):
    """The fields of every call that generates.

    ``loops``, ``exit_threshold``, ``min_loops``, ``exit_change``, ``exit_kl``, ``exit_same``, ``exit_entropy``,
    ``exit_margin``, ``exit``, ``exit_at_step``, ``start_seed``, ``start_state``, ``top_k``, ``min_p``,
    ``repetition_penalty``, ``ignore_eos`` and ``max_seconds`` are extensions of OpenAI's API.
    """

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    seed: Seed | None = None
    stop: Annotated[
        Annotated[None, Tag("~none")]
        | Annotated[Stop, Tag("~text")]
        | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), Tag("~texts")],
        by_kind({type(None): "~none", str: "~text", list: "~texts"}, "stop is text or a list of texts"),
    ] = None
    loops: Count | None = None
    exit_threshold: Share | None = None
    min_loops: Count | None = None
    exit_change: Number | None = None
    exit_kl: Number | None = None
    exit_same: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    exit_entropy: Number | None = None
    exit_margin: Share | None = None
    exit: Annotated[str, Field(max_length=256)] | None = None
    exit_at_step: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    start_seed: Annotated[int, Field(ge=0, lt=1 << 64)] | None = None
    start_state: Annotated[str, Field(max_length=32)] | None = None
    top_k: Annotated[int, Field(lt=1 << 31)] | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    ignore_eos: bool | None = None
    max_seconds: Seconds | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Number], Field(max_length=_MAX_BIASES, fail_fast=True)] | None = None
    # For the client's records and for load balancing; accepted and not stored.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _streamed(self) -> CommonFields:
        if self.stream_options is not None and not self.stream:
            raise invalid("they belong to a stream", "stream_options")
        return self

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class RequestBody(CommonFields):
    """The common fields of completions and chats."""

    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    response_format: ResponseFormat | None = None
    store: Annotated[None, unsupported("this server stores no replies; only false is possible", False)] = None


class CompletionBody(RequestBody):
    """A completion request with one or several prompts: text or token ids."""

    prompt_field: ClassVar[str | None] = "prompt"
    prompt: Annotated[
        Annotated[str, Tag("~text")]
        | Annotated[list[str], Field(fail_fast=True), Tag("~texts")]
        | Annotated[Tokens, Tag("~ids")]
        | Annotated[list[Tokens], Field(fail_fast=True), Tag("~lists")],
        by_kind({str: "~text", list: prompt_kind}, "a prompt is text, token ids, or a list of either"),
    ]
    max_tokens: Annotated[int, Field(ge=0, le=MOST)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: Annotated[None, unsupported("nothing can be put in before a suffix; only null is possible", "")] = None

    @model_validator(mode="after")
    def _best_of(self) -> CompletionBody:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise invalid(f"it must be at least n, which is {self.n or 1}", "best_of")
        if self.stream and self.chosen_from > (self.n or 1):
            raise invalid("a stream cannot wait for all choices to pick the best; leave out one of them", "best_of")
        return self

    @property
    def limit_field(self) -> str:
        """The field that limits the answer's tokens."""
        return "max_tokens"

    @property
    def count_field(self) -> str:
        """The field that multiplies choices."""
        return "best_of" if self.best_of is not None else "n" if self.n is not None else "prompt"

    @property
    def chosen_from(self) -> int:
        """How many choices are generated for a prompt; ``n`` of them are returned."""
        return self.best_of or self.n or 1
