"""Text from tokens as they come, without ever showing a part of a character."""

from __future__ import annotations

from ..errors import PromptError
from .token_bytes import BYTE_PIECE
from .tokenizer import TextCodec

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


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
        # Held here, because this runs for every token, when the processor's caches are full of weights.
        self._tokenizer, self._skip = codec.tokenizer, skip_special_tokens
        self._hidden = codec.special if skip_special_tokens else {}
        self._byte_fallback = codec.token_bytes.byte_fallback
        self._window: list[int] = []
        self._shown = 0  # characters of the decoded window that were given out

    def push(self, token_id: int) -> str:
        """The text that is certain now that this token came: often its own, "" while a character is incomplete."""
        token_id = int(token_id)
        if token_id in self._hidden:
            return ""
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
        if len(self._window) >= 2 * self._CONTEXT:
            self._window = self._window[-self._CONTEXT :]
            self._shown = _certain(self._decode())
        return piece

    def settle(self) -> str:
        """The rest of the text so far, as ``flush`` gives it; but the next push goes on with the same text."""
        text = self._decode()
        rest = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return rest

    def flush(self) -> str:
        """The rest of the text, an incomplete character as decode() gives it; the next push begins a new text."""
        rest = self._decode()[self._shown :]
        self._window, self._shown = [], 0
        return rest

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip)


def _certain(text: str) -> int:
    """How many characters no later token can change: all but a U+FFFD at the end, maybe a character in the making."""
    return len(text) - text.endswith(_INCOMPLETE)
