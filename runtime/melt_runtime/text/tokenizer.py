"""A package's tokenizer: text to token ids and back, and its chat template."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import ArgumentError, PackageError, PromptError
from ..untrusted import brief, read_object, read_text
from .templating.chat_template import ChatTemplate
from .templating.variables import special_tokens, template_variables
from .token_bytes import TokenBytes
from .tokenizer_file import tokenizer_of
from .unencodable import drops_characters, lacking

_LONG = 10_000  # characters, which take some milliseconds
MOST_TOKENIZER_BYTES = 256 << 20  # several times the largest tokenizer files of today


@dataclass(frozen=True)
class Message:
    """One message of a chat. ``role``: "system", "user" or "assistant"."""

    role: str
    content: str

    def plain(self) -> dict[str, str]:
        """Return the message as a dict for the chat template."""
        return {"role": self.role, "content": self.content}


class TextTokenizer:
    """A package's tokenizer and chat template; ``load`` reads them from its directory.

    ``backend_tokenizer``: any tokenizer of the tokenizers library; its truncation and padding are switched off.
    ``special_tokens``: text by name, such as "bos_token", for the chat template. ``chat_template``: Jinja source, or
    None. ``tool_template``: the template for requests with tools. Raises PackageError for invalid Jinja.
    """

    def __init__(
        self,
        backend_tokenizer: Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        tool_template: str | None = None,
    ) -> None:
        # Both would silently change prompts: the runtime checks lengths and masks padding itself.
        backend_tokenizer.no_truncation()
        backend_tokenizer.no_padding()
        self.backend_tokenizer = backend_tokenizer
        self.special_tokens = dict(special_tokens or {})
        self._template = None if chat_template is None else ChatTemplate(chat_template)
        self._tool_template = self._template if tool_template is None else ChatTemplate(tool_template)
        added = backend_tokenizer.get_added_tokens_decoder()
        self.special = {token_id: token.content for token_id, token in added.items() if token.special}
        self.token_bytes = TokenBytes(backend_tokenizer)
        self._drops_characters = drops_characters(backend_tokenizer)

    @classmethod
    def load(cls, directory: Path, listed: Container[str] | None = None) -> TextTokenizer:
        """Read ``tokenizer.json`` and, where present, ``tokenizer_config.json``, ``special_tokens_map.json`` and
        ``chat_template.jinja``.

        ``listed``: the files that may be read, as the manifest names them; None: all. Raises PackageError if
        tokenizer.json is missing or a file cannot be read.
        """

        def there(name: str) -> Path | None:
            path = Path(directory) / name
            return path if path.is_file() and (listed is None or name in listed) else None

        path = there("tokenizer.json")
        if path is None:
            raise PackageError(f"The package has no tokenizer.json in {directory}; export it again.")
        try:
            tokenizer = tokenizer_of(read_text(path, MOST_TOKENIZER_BYTES))
        except ValueError as error:
            raise PackageError(
                f"{path} is not a valid tokenizer ({brief(error)}); export the package again."
            ) from error
        files = map(there, ("tokenizer_config.json", "special_tokens_map.json"))
        config, tokens_map = ({} if file is None else read_object(file) for file in files)
        path = there("chat_template.jinja")
        templates = _template_sources(config) if path is None else {"default": read_text(path)}
        tokens = special_tokens(config, tokens_map)
        return cls(tokenizer, tokens, templates.get("default"), templates.get("tool_use"))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added tokens included."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``render_chat`` can be used."""
        return self._template is not None

    def template_source(self, tools: bool = False) -> str | None:
        """Return the Jinja source of the chat template, or of the one for requests with tools; None if there is
        none."""
        template = self._tool_template if tools else self._template
        return None if template is None else template.source

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, given its exact text in the vocabulary, or None."""
        return self.backend_tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        ``add_special_tokens``: add the tokenizer's special tokens, such as BOS; pass False for a rendered chat, whose
        template wrote them. Raises PromptError for text that is not valid Unicode or has a character without any token.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"The prompt is not valid Unicode at character {error.start}; remove the lone surrogate."
            raise PromptError(message) from error
        try:
            if len(text) > _LONG:  # a batch of one, because only encode_batch releases the interpreter lock
                (encoded,) = self.backend_tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
            else:
                encoded = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            reason: str | None = lacking(self.backend_tokenizer, text) or f"The tokenizer failed: {brief(error)}"
            raise PromptError(f"{reason}.") from error
        if self._drops_characters and (reason := lacking(self.backend_tokenizer, text)) is not None:
            raise PromptError(f"{reason}.")
        return list(encoded.ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Raises PromptError for ids below 0.

        Ids without a token give no text: a model may have more embeddings than the tokenizer has tokens.
        """
        try:
            return self.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise PromptError("Token ids must be from 0 to 4,294,967,295.") from error

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], /, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the prompt text of a conversation, as transformers renders it. Encode it with
        ``add_special_tokens=False``.

        ``messages``: dicts with "role", "content" and further fields of the template. ``add_generation_prompt``: end
        with the start of the assistant's turn. ``variables``: further plain values for the template, such as
        ``enable_thinking=False`` or ``tools=[...]``.

        Raises ArgumentError if the package has no chat template, PromptError for malformed messages, messages that the
        template refuses, and unusable variables, PackageError if the template itself fails.
        """
        template = self._template if variables.get("tools") is None else self._tool_template
        if template is None:
            raise ArgumentError("This package has no chat template; pass plain text instead of chat messages.")
        given = {"add_generation_prompt": add_generation_prompt, **variables}
        try:
            return template.render(template_variables(messages, self.special_tokens, given))
        except PackageError as error:
            if not variables:
                raise
            names = ", ".join(map(repr, variables))
            raise PromptError(f"The chat template failed where {names} was given: {error}") from error

    def shows(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Return whether decode() gives any text for this id."""
        if skip_special_tokens and token_id in self.special:
            return False
        try:
            return self.backend_tokenizer.id_to_token(token_id) is not None
        except OverflowError as error:
            raise PromptError(f"Token ids must be from 0 to 4,294,967,295, not {token_id}.") from error

    def special_tokens_in(self, texts: Sequence[str]) -> dict[str, int]:
        """Return the special tokens that occur in some texts: text -> id."""
        joined = "\0".join(texts)
        return {text: token_id for token_id, text in self.special.items() if text and text in joined}


def _template_sources(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the templates in tokenizer_config.json by name; a single one is called "default"."""
    given = config.get("chat_template")
    entries = given if isinstance(given, list) else [] if given is None else [{"name": "default", "template": given}]
    if not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in entries
    ):
        raise PackageError(
            "chat_template in tokenizer_config.json must be text, or a list of names and templates; export the "
            "package again."
        )
    return {entry["name"]: entry["template"] for entry in entries}
