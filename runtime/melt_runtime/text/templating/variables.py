"""The variables of a chat template: messages and plain values, and the tokenizer's special tokens by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import PackageError, PromptError

STANDARD_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_END = "<|endoftext|>"
_CLASSES: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END),
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {
        name: f"<{name.removesuffix('_token')}>" for name in STANDARD_TOKENS if name[:3] not in ("sep", "cls")
    },
}
# Variables that callers may not set, because they would be ignored or misunderstood.
_RESERVED = ("messages", "chat_template", "tokenize", "continue_final_message")
_MAX_DEPTH = 100
# Field names for reasoning; templates read the first, gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def special_tokens(config: Mapping[str, Any], tokens_map: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the special tokens by name, such as "bos_token" and "image_token", as transformers 5 reads them.

    ``config``: tokenizer_config.json. ``tokens_map``: special_tokens_map.json, used only if the config lists no added
    tokens. Raises PackageError for a token that is not text.
    """
    # Under other names, an object is a token only if it has a "__type".
    given = {
        name: value
        for name, value in config.items()
        if name in STANDARD_TOKENS
        or not (isinstance(value, Mapping) and name.endswith("_token") and "__type" not in value)
    }
    if "added_tokens_decoder" not in config:
        given.update(tokens_map or {})
    given = {**_defaults(config), **given}
    wrong = next((n for n in STANDARD_TOKENS if given.get(n) is not None and not _is_token(given[n])), None)
    if wrong is not None:
        raise PackageError(f"{wrong} in tokenizer_config.json must be text; export the package again.")
    named = {name: value for name, value in given.items() if name.endswith("_token")}
    for field in ("model_specific_special_tokens", "extra_special_tokens"):
        extra = given.get(field)
        if isinstance(extra, Mapping):
            named.update(extra)
    tokens = {name: value for name, value in named.items() if _is_token(value)}
    return {name: value if isinstance(value, str) else value["content"] for name, value in tokens.items()}


def _defaults(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the tokens that a tokenizer class has by default."""
    name = config.get("tokenizer_class")
    return _CLASSES.get(name.removesuffix("Fast"), {}) if isinstance(name, str) else {}


def _is_token(value: Any) -> bool:
    """Return whether this is a token: text, or an object with its text."""
    return isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("content"), str))


def template_variables(
    messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all variables of a template. ``given``: the caller's, such as ``enable_thinking`` or ``tools``.

    Raises PromptError for malformed messages and for variables that are not plain values.
    """
    reserved = next((name for name in _RESERVED if name in given), None)
    if reserved is not None:
        raise PromptError(f"{reserved!r} is not a variable of chat templates that can be set.")
    return {
        "tools": None,
        "documents": None,
        **tokens,
        **{name: plain(value, name) for name, value in given.items()},
        "messages": _checked(messages),
    }


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as dicts without empty fields. Raises PromptError."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise PromptError("Chat messages must be a non-empty list of dicts with a role and a content.")
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(f"Chat message {number} must be a dict with a role and a content, not {message!r}.")
    # Templates test whether a field exists, and would print None.
    given = {name: plain(value, f"message {number}") for name, value in message.items() if value is not None}
    if not isinstance(given.get("role"), str):
        raise PromptError(f"Chat message {number} needs the text 'role'.")
    content = given.get("content")
    if not isinstance(content, str | list) and (content is not None or given.keys() <= {"role", "name"}):
        raise PromptError(f"Chat message {number} needs the text 'content'.")
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """Copy plain values, as in JSON, without objects that have methods of their own. Raises PromptError."""
    if depth > _MAX_DEPTH:
        raise PromptError(f"Chat templates take values of at most {_MAX_DEPTH} levels; {where} has more.")
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {plain(key, where, depth + 1): plain(one, where, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        copied = [plain(one, where, depth + 1) for one in value]
        return copied if isinstance(value, list) else tuple(copied)
    raise PromptError(f"Chat templates take plain values, as JSON has them; {where} has {type(value).__name__}.")
