"""Decode text from tokens one at a time, without showing part of a character."""

from __future__ import annotations

from collections.abc import Container, Sequence

from ..errors import PromptError
from .text_before import CONTEXT, TextBefore, text_before
from .token_bytes import BYTE_PIECE
from .tokenizer import TextTokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder:
    """A decoder of one token at a time. The joined outputs equal ``decode(all ids)`` after ``flush``, or what they add
    to the prompt's text.

    No output ends inside a character. This holds for decoders that only append: byte-level, Metaspace, WordPiece, BPE,
    byte fallback, and joining with spaces. Byte-fallback tokens are held until their run ends, because decode()
    replaces the whole run if one of its characters is incomplete. Each push decodes a short window of the latest ids,
    so its time does not depend on the length of the text.

    ``shown``: special tokens that are written out, although others are skipped. ``prompt``: the token ids that the text
    continues. Many decoders drop a space at the beginning of a text, which is no longer there after a prompt.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        skip_special_tokens: bool = True,
        shown: Container[int] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        # Kept as attributes: this runs per token, when the processor's caches are full of weights.
        self._tokenizer = tokenizer.backend_tokenizer
        self._hidden = tokenizer.special if skip_special_tokens else {}
        self._written_out = shown
        self._byte_fallback = tokenizer.token_bytes.byte_fallback
        before = text_before(tokenizer, prompt, skip_special_tokens) if prompt else TextBefore()
        self._window = list(before.tokens)
        self._shown = before.shown(tokenizer) if prompt else 0  # characters of the decoded window already returned

    def push(self, token_id: int) -> str:
        """Add a token. Return the text that is now certain; "" while a character is incomplete."""
        token_id = int(token_id)
        if token_id in self._hidden:
            return self._write_out(token_id) if token_id in self._written_out else ""
        try:
            token = self._tokenizer.id_to_token(token_id)
        except OverflowError as error:
            raise PromptError(f"Token ids must be from 0 to 4,294,967,295, not {token_id}.") from error
        if token is None:
            return ""
        self._window.append(token_id)
        if self._byte_fallback and BYTE_PIECE.fullmatch(token):
            return ""
        text = self._decode()
        end = _certain(text)
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        if len(self._window) >= 2 * CONTEXT:
            self._window = self._window[-CONTEXT:]
            self._shown = _certain(self._decode())
        return piece

    def settle(self) -> str:
        """Return the rest of the text as ``flush`` does; the next push continues the same text."""
        text = self._decode()
        rest = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return rest

    def flush(self) -> str:
        """Return the rest of the text, incomplete characters as decode() gives them; the next push begins a new
        text."""
        rest = self._decode()[self._shown :]
        self._window, self._shown = [], 0
        return rest

    def _write_out(self, token_id: int) -> str:
        """Return the rest of the text before a special token, and that token, which later text continues."""
        rest = self.flush()
        self._window = [token_id]
        self._shown = len(self._decode())
        return rest + self._hidden[token_id]

    def _decode(self) -> str:
        # The window has no special token that is skipped.
        return self._tokenizer.decode(self._window, skip_special_tokens=False)


def _certain(text: str) -> int:
    """Return how many characters no later token can change: all but a final U+FFFD, which may be an incomplete
    character."""
    return len(text) - text.endswith(_INCOMPLETE)
