"""The schema of calls that only turn text into tokens and back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from .chat_schema import Message
from .fields import Name, Strict, Tokens, invalid
from .tool_schema import Tools


class TokenizeBody(Strict):
    """A text, or the messages of a chat, to tokenize. ``add_special_tokens``: by default for a text only, because a
    chat template writes them itself."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("give either prompt or messages", "prompt")
        return self


class DetokenizeBody(Strict):
    """Tokens whose text is asked for, special tokens included."""

    model: Name | None = None
    tokens: Tokens
