"""Which tokens end a text, which a turn of a chat, and who says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MeltError, PackageError
from ..package.manifest_schema import STOP_IDS
from ..package.reader import Package
from ..untrusted import FieldError, optional, read_object
from .tokenizer import TextCodec

GENERATION = "generation_config.json"
# Words that no template has by itself, and none changes.
_ANSWER, _NEXT = "zanswerz", "znextz"


@dataclass(frozen=True)
class EndToken:
    """A token that stops generation: everywhere, or in chats alone. ``text``: as the tokenizer has it; None: it has
    none. ``sources``: what names it, such as "generation_config.json"."""

    id: int
    text: str | None
    chats_only: bool
    sources: tuple[str, ...]


def end_tokens(package: Package, codec: TextCodec | None) -> tuple[EndToken, ...]:
    """The tokens that end a text or a turn. Raises PackageError.

    The configuration's end every text. A checkpoint's configuration often names another token than the one with which
    its chat template ends a turn; in a chat that one, and the tokenizer's own eos_token, stop as well.
    """
    source, configured = configured_ends(package.file(GENERATION), package.manifest.model)
    found = {token_id: [source] for token_id in sorted(configured)}
    if codec is not None:
        chat = {
            "the tokenizer's eos_token": codec.special_tokens.get("eos_token"),
            "the chat template": end_of_turn(codec),
        }
        for name, text in chat.items():
            token_id = None if text is None or not codec.has_chat_template else codec.token_id(text)
            if token_id is not None and token_id < package.manifest.vocab_size:
                found.setdefault(token_id, []).append(name)
    return tuple(
        EndToken(token_id, _text(codec, token_id), token_id not in configured, tuple(sources))
        for token_id, sources in found.items()
    )


def stop_ids_of(package: Package) -> set[int]:
    """The end-of-text ids of generation_config.json, else of the model's configuration. Raises PackageError."""
    return configured_ends(package.file(GENERATION), package.manifest.model)[1]


def end_of_turn(codec: TextCodec) -> str | None:
    """The token that the chat template writes behind an answer; None: it writes none, or cannot be asked."""
    if not codec.has_chat_template:
        return None
    question, answer = {"role": "user", "content": _NEXT}, {"role": "assistant", "content": _ANSWER}
    added = (token.content for token in codec.tokenizer.get_added_tokens_decoder().values())
    # Blanks can be tokens, too, and stand in answers.
    tokens = sorted((text for text in added if text.strip()), key=len, reverse=True)
    # An end that stands only between two turns shows with a question behind the answer.
    for messages in ([question, answer], [question, answer, question]):
        try:
            text = codec.render_chat(messages, add_generation_prompt=False)
        except MeltError:
            continue
        _, said, rest = text.rpartition(_ANSWER)
        found = next((token for token in tokens if said and rest.lstrip().startswith(token)), None)
        if found is not None:
            return found
    return None


def _text(codec: TextCodec | None, token_id: int) -> str | None:
    return None if codec is None else codec.tokenizer.id_to_token(token_id)


def configured_ends(path: Path | None, model: Mapping[str, Any]) -> tuple[str, set[int]]:
    """Which file names the end-of-text ids, and these. path: of a generation_config.json, if there is one; model: the
    model's configuration. Raises PackageError."""
    source, value = GENERATION, None
    if path is not None:
        try:
            value = optional(STOP_IDS)(read_object(path).get("eos_token_id"), "eos_token_id")
        except FieldError as error:
            raise PackageError(f"{path}: {error}") from error
    if value is None:
        source, value = "config.json", model.get("eos_token_id")
    if value is None:
        return source, set()
    return source, {value} if isinstance(value, int) else set(value)
