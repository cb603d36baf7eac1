"""Encode prompts, and refuse those that cannot fit before much of them is tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ArgumentError, PromptError, PromptTooLongError
from ..runtime import Runtime
from ..text.text_before import closed_text
from .chat_schema import ChatBody
from .reply_parser import Reading
from .schema import CompletionBody
from .tool_formats import ModelFormat
from .tool_grammar import output_format
from .tool_prompts import rendered, thinking

_CHARACTERS = 16  # characters per free token that are tokenized at first; most text has 3 to 5 per token


def prompts_encoded(runtime: Runtime, given: str | Sequence[Any]) -> Sequence[list[int]]:
    """Return the token ids of one prompt or several, as text or ids. Raises PromptError."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [_one(runtime, given)]  # type: ignore[arg-type]
    if not given:
        raise PromptError("there is no prompt")
    return [_one(runtime, one) for one in given]


def chat_encoded(runtime: Runtime, call: ChatBody, format: ModelFormat | None) -> tuple[list[int], Reading | None]:
    """Return the token ids of a chat, and how its answers are taken apart. Raises PromptError, ArgumentError."""
    room = runtime.manifest.max_seq_len
    if len(call.messages) > room:
        raise PromptTooLongError(f"{len(call.messages)} messages do not fit: the cache has room for {room} tokens")
    if runtime.tokenizer is None or format is None:
        raise ArgumentError("the package has no tokenizer, so no chat template")
    messages = [message.plain() for message in call.messages]
    text = rendered(runtime.tokenizer, format, messages, call.offered, call.template_variables)
    check_length(runtime, text)
    ids = runtime.tokenizer.encode(text, add_special_tokens=False)
    names = frozenset(tool.function.name for tool in call.offered)
    begun = thinking(text, format)
    if not names and begun is None:
        return ids, None
    return ids, Reading(output_format(format.tools, call.must_call), names, begun)


def prompt_texts(runtime: Runtime, call: CompletionBody, prompts: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Return the text of each of a call's prompts: as it was given, or what its tokens say."""
    tokenizer = runtime.tokenizer
    given = call.prompt if isinstance(call.prompt, list) and isinstance(call.prompt[0], str) else [call.prompt]
    texts = [one for one in given if isinstance(one, str)]
    if texts or tokenizer is None:
        return tuple(texts or [""] * len(prompts))
    ends = call.max_tokens == 0  # with the prompt
    return tuple(tokenizer.decode(ids) if ends else closed_text(tokenizer, ids) for ids in prompts)


def _one(runtime: Runtime, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        check_length(runtime, prompt)
    return runtime.encode(prompt)


def check_length(runtime: Runtime, text: str) -> None:
    """Raise PromptTooLongError for a text with more tokens than fit, found by tokenizing its beginning.

    A text that fits is tokenized at most twice. The beginning may have up to twice the tokens that fit, because its
    last token is cut.
    """
    if runtime.tokenizer is None:
        return
    room = runtime.manifest.max_seq_len
    size = _CHARACTERS * room
    while size < len(text):
        try:
            # A batch of one, because only encode_batch releases the interpreter lock.
            (begun,) = runtime.tokenizer.backend_tokenizer.encode_batch([text[:size]], add_special_tokens=False)
        except Exception:  # encode() raises the error about this text
            runtime.tokenizer.encode(text[:size], add_special_tokens=False)
            return
        if len(begun.ids) > 2 * room:
            raise PromptTooLongError(f"{len(text):,} characters do not fit: the cache has room for {room} tokens")
        size *= 2
