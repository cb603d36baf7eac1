"""Text to token ids and back: the tokenizer of a package, its chat template, and decoding token by token."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from .checked import brief, read_object, read_text
from .errors import ArgumentError, PackageError, PromptError
from .token_bytes import TokenBytes
from .tokenizer_file import tokenizer_of

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
MOST_TOKENIZER_BYTES = 256 << 20  # several times the largest vocabularies of today


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. ``role``: "system", "user" or "assistant"."""

    role: str
    content: str

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        return {"role": self.role, "content": self.content}


class TextCodec:
    """The tokenizer of a package and its chat template; `TextCodec.load` reads them from its directory.

    tokenizer: any tokenizer of the tokenizers library; its truncation and padding are switched off.
    bos_token, eos_token: their text, for the chat template. chat_template: Jinja source, or None.
    Raises PackageError for a chat template that is not valid Jinja.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        # Both would silently change prompts: the runtime checks lengths itself and pads with its own mask.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._template = None if chat_template is None else _compile(chat_template)
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self.token_bytes = TokenBytes(tokenizer)

    @classmethod
    def load(cls, directory: Path, listed: Container[str] | None = None) -> TextCodec:
        """Read `tokenizer.json` and, where present, `tokenizer_config.json` and `chat_template.jinja`.

        listed: the files that may be read, as a package's manifest names them; None: all that are there. Raises
        PackageError if tokenizer.json is missing or any of them cannot be read.
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
        config_path, template_path = there("tokenizer_config.json"), there("chat_template.jinja")
        config = {} if config_path is None else read_object(config_path)
        template = _template_source(config) if template_path is None else read_text(template_path)
        return cls(tokenizer, _token_text(config, "bos_token"), _token_text(config, "eos_token"), template)

    @property
    def vocab_size(self) -> int:
        """How many tokens the tokenizer knows, added ones included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can be used."""
        return self._template is not None

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its exact text in the vocabulary, or None."""
        return self.tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text. add_special_tokens: add what the tokenizer puts around a plain text, such as BOS;
        pass False for a rendered chat, whose template wrote them already. Raises PromptError for text that is not
        valid Unicode."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"The prompt is not valid Unicode at character {error.start}; remove the lone surrogate."
            raise PromptError(message) from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids without a token give no text, as a model may have more rows than the tokenizer
        has tokens; negative ids raise PromptError."""
        try:
            return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise PromptError("Token ids must be from 0 to 4,294,967,295.") from error

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation; encode it with add_special_tokens=False.

        messages: dicts with the strings "role" and "content". add_generation_prompt: end with the opening of the
        assistant's turn. Raises ArgumentError if the package has no chat template, PromptError for messages that
        are malformed or that the template refuses, PackageError if the template itself fails.
        """
        if self._template is None:
            raise ArgumentError("This package has no chat template; pass plain text instead of chat messages.")
        try:
            return self._template.render(
                messages=_checked(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
            )
        except PromptError:
            raise
        except Exception as error:  # a template is code of the package and can fail in any way
            raise PackageError(f"The chat template of this package failed: {brief(error)}.") from error

    def shows(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether decode() would take any notice of this id."""
        if skip_special_tokens and token_id in self._special:
            return False
        try:
            return self.tokenizer.id_to_token(token_id) is not None
        except OverflowError as error:
            raise PromptError(f"Token ids must be from 0 to 4,294,967,295, not {token_id}.") from error

    def special_tokens_in(self, texts: Sequence[str]) -> dict[str, int]:
        """The special tokens whose text occurs in one of some texts: text -> id."""
        joined = "\0".join(texts)
        return {text: token_id for token_id, text in self._special.items() if text and text in joined}


class StreamDecoder:
    """Decodes ids one at a time; the pieces joined equal `codec.decode(all ids)` once `flush` was called.

    No piece ends inside a character. Holds for decoders whose text only grows at its end: byte-level, Metaspace,
    WordPiece, BPE, byte fallback, and the plain join with spaces. Byte-fallback tokens are held until their run
    ends, because decode() replaces a whole run if a single character of it turns out incomplete. A push decodes a
    short window of the latest ids, so its cost does not depend on the length of the text.
    """

    # UTF-8 has at most 4 bytes a character and a byte-level token at least one byte, so 8 tokens always contain a
    # boundary after which a decoder started in mid-text agrees with one that saw everything.
    _CONTEXT = 8

    def __init__(self, codec: TextCodec, skip_special_tokens: bool = True) -> None:
        self._codec = codec
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._shown = 0  # characters of the decoded window that were given out

    def push(self, token_id: int) -> str:
        """The text that is certain now that this token came: often its own, "" while a character is incomplete."""
        token_id = int(token_id)
        if not self._codec.shows(token_id, self._skip):
            return ""
        self._window.append(token_id)
        if self._codec.token_bytes.is_byte(token_id):
            return ""
        text = self._codec.decode(self._window, self._skip)
        end = _certain(text)
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        if len(self._window) >= 2 * self._CONTEXT:
            self._window = self._window[-self._CONTEXT :]
            self._shown = _certain(self._codec.decode(self._window, self._skip))
        return piece

    def settle(self) -> str:
        """The rest of the text so far, as ``flush`` gives it; but the next push goes on with the same text."""
        text = self._codec.decode(self._window, self._skip)
        rest = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return rest

    def flush(self) -> str:
        """The rest of the text, an incomplete character as decode() gives it; the next push begins a new text."""
        rest = self._codec.decode(self._window, self._skip)[self._shown :]
        self._window, self._shown = [], 0
        return rest


def _certain(text: str) -> int:
    """How many characters no later token can change: all but a U+FFFD at the end, maybe a character in the making."""
    return len(text) - text.endswith(_INCOMPLETE)


def _token_text(config: Mapping[str, Any], name: str) -> str | None:
    token = config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None or isinstance(token, str):
        return token
    raise PackageError(f"{name} in tokenizer_config.json must be text; export the package again.")


def _template_source(config: Mapping[str, Any]) -> str | None:
    """The template in tokenizer_config.json: a string, or the one named "default" of a list of them."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is None or isinstance(template, str):
        return template
    raise PackageError("chat_template in tokenizer_config.json must be text or a list; export the package again.")


def _checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The messages as dicts, or PromptError."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise PromptError("Chat messages must be a non-empty list of dicts with a role and a content.")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(f"Chat message {number} must be a dict with a role and a content, not {message!r}.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise PromptError(f"Chat message {number} needs the text {key!r}.")
    return [dict(message) for message in messages]


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here its content is written as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise PromptError(f"The chat template refuses these messages: {message}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes <, > and & for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise PackageError(f"The chat template is not valid Jinja (line {error.lineno}: {brief(error)}).") from error
