"""Prompts that cannot fit are refused before much of them is tokenized."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ArgumentError, PromptError
from ..runtime import Runtime
from .schema import ChatAsk, CompletionAsk

_CHARACTERS = 16  # for each token of room are tokenized at once; most text has 3 to 5 per token


def encoded(runtime: Runtime, ask: CompletionAsk | ChatAsk) -> Sequence[list[int]]:
    """The prompts of a call as token ids. Raises PromptError, ArgumentError."""
    if isinstance(ask, ChatAsk):
        return [_chat(runtime, ask)]
    prompt = ask.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [_one(runtime, prompt)]  # type: ignore[arg-type]
    if not prompt:
        raise PromptError("there is no prompt")
    return [_one(runtime, one) for one in prompt]  # type: ignore[arg-type]


def _one(runtime: Runtime, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        check_length(runtime, prompt)
    return runtime.encode(prompt)


def _chat(runtime: Runtime, ask: ChatAsk) -> list[int]:
    room = runtime.manifest.max_seq_len
    if len(ask.messages) > room:
        raise PromptError(f"{len(ask.messages)} messages do not fit: the cache has room for {room} tokens")
    if runtime.tokenizer is None:
        raise ArgumentError("the package has no tokenizer, so no chat template")
    variables = ask.chat_template_kwargs or {}
    text = runtime.tokenizer.render_chat([message.plain() for message in ask.messages], **variables)
    check_length(runtime, text)
    return runtime.tokenizer.encode(text, add_special_tokens=False)


def check_length(runtime: Runtime, text: str) -> None:
    """Raises PromptError for a text that has more tokens than there is room for, found by tokenizing its beginning.

    A text that fits costs at most twice its tokenizing. The beginning may have twice as many tokens as there is room
    for, because the token at its end is cut.
    """
    if runtime.tokenizer is None:
        return
    room = runtime.manifest.max_seq_len
    size = _CHARACTERS * room
    while size < len(text):
        try:
            # A batch of one: other threads go on meanwhile, which `encode` does not let them.
            (begun,) = runtime.tokenizer.backend_tokenizer.encode_batch([text[:size]], add_special_tokens=False)
        except Exception:  # encoding says what is wrong with the text
            runtime.tokenizer.encode(text[:size], add_special_tokens=False)
            return
        if len(begun.ids) > 2 * room:
            raise PromptError(f"{len(text):,} characters do not fit: the cache has room for {room} tokens")
        size *= 2
