"""End tokens: those that end a text, those that end a chat turn, and where they are configured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MeltError, PackageError
from ..package.manifest_schema import STOP_IDS
from ..package.reader import Package
from ..untrusted import FieldError, optional, read_object
from .tokenizer import TextTokenizer

GENERATION = "generation_config.json"
# Words that occur in no template and that none changes.
_ANSWER, _NEXT = "zanswerz", "znextz"


@dataclass(frozen=True)
class EndToken:
    """A token that stops generation, everywhere or only in chats.

    ``text``: its text in the vocabulary, or None. ``sources``: where it is configured, such as
    "generation_config.json".
    """

    id: int
    text: str | None
    chats_only: bool
    sources: tuple[str, ...]


def end_tokens(package: Package, tokenizer: TextTokenizer | None) -> tuple[EndToken, ...]:
    """Return the tokens that end a text or a chat turn. Raises PackageError.

    The configured tokens end every text. Chat templates often end turns with another token; that token and the
    tokenizer's eos_token end answers in chats only.
    """
    source, configured = configured_ends(package.file(GENERATION), package.manifest.model)
    found = {token_id: [source] for token_id in sorted(configured)}
    if tokenizer is not None:
        chat = {
            "the tokenizer's eos_token": tokenizer.special_tokens.get("eos_token"),
            "the chat template": end_of_turn(tokenizer),
        }
        for name, text in chat.items():
            token_id = None if text is None or not tokenizer.has_chat_template else tokenizer.token_id(text)
            if token_id is not None and token_id < package.manifest.vocab_size:
                found.setdefault(token_id, []).append(name)
    return tuple(
        EndToken(token_id, _text(tokenizer, token_id), token_id not in configured, tuple(sources))
        for token_id, sources in found.items()
    )


def stop_ids_of(package: Package) -> set[int]:
    """Return the end-of-text ids of generation_config.json, else of the model's configuration. Raises PackageError."""
    return configured_ends(package.file(GENERATION), package.manifest.model)[1]


def end_of_turn(tokenizer: TextTokenizer) -> str | None:
    """Return the token that the chat template writes after an answer; None if there is none or the template fails."""
    if not tokenizer.has_chat_template:
        return None
    question, answer = {"role": "user", "content": _NEXT}, {"role": "assistant", "content": _ANSWER}
    added = (token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values())
    # Tokens of white space also occur inside answers.
    tokens = sorted((text for text in added if text.strip()), key=len, reverse=True)
    # Some templates write the end only if another turn follows.
    for messages in ([question, answer], [question, answer, question]):
        try:
            text = tokenizer.render_chat(messages, add_generation_prompt=False)
        except MeltError:
            continue
        _, said, rest = text.rpartition(_ANSWER)
        found = next((token for token in tokens if said and rest.lstrip().startswith(token)), None)
        if found is not None:
            return found
    return None


def _text(tokenizer: TextTokenizer | None, token_id: int) -> str | None:
    return None if tokenizer is None else tokenizer.backend_tokenizer.id_to_token(token_id)


def configured_ends(path: Path | None, model: Mapping[str, Any]) -> tuple[str, set[int]]:
    """Return the file that names the end-of-text ids, and the ids. Raises PackageError.

    ``path``: of generation_config.json, or None. ``model``: the model's configuration.
    """
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
