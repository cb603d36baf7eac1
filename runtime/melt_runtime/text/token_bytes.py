"""The bytes of single tokens, from their pieces in the vocabulary, and where each token begins in its text."""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LEFT, _RIGHT = "q", "z"  # neighbours that no decoder changes, to see a piece in the middle of a text


class TokenBytes:
    """What each token adds to a text, as bytes: ``b"".join(map(token_bytes.of, ids))`` is the UTF-8 of what
    ``Tokenizer.decode`` gives for these ids, but for its first token, whose bytes ``first`` gives, and for bytes that
    are no UTF-8, which it replaces.

    How a piece becomes bytes depends on the decoder of the tokenizer: in a byte-level vocabulary each character of a
    piece stands for a byte; with a ByteFallback step a piece such as <0xE4> is one byte; what other decoders make of a
    piece (U+2581 becomes a space, "##" goes, words are joined by spaces) is asked of the decoder, between two
    neighbours. Special tokens have the bytes of their own text, though a text usually leaves them out.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._decoder = tokenizer, tokenizer.decoder
        steps = set() if self._decoder is None else set(_steps(json.loads(self._decoder.__getstate__())))
        self._bytes_of_characters = _byte_level_alphabet() if "ByteLevel" in steps else None
        self.byte_fallback = "ByteFallback" in steps
        self._before = self._join(_LEFT)
        self._after = self._join(_LEFT, _RIGHT)[len(self._before) :]

    def of(self, token: int) -> bytes:
        """The bytes that a token adds in the middle of a text; b"" for an id without a token."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._bytes_of_characters is not None:
            return self._byte_level(piece)
        if self.byte_fallback and (byte := byte_of(piece)) is not None:
            return bytes([byte])
        text = self._join(_LEFT, piece, _RIGHT)
        if text.startswith(self._before) and text.endswith(self._after):
            return text[len(self._before) : len(text) - len(self._after)].encode()
        return piece.encode()

    def first(self, token: int) -> bytes:
        """The bytes of a token that begins a text, where many decoders drop a space."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._bytes_of_characters is not None:
            return self._byte_level(piece)
        byte = byte_of(piece) if self.byte_fallback else None
        if byte is not None and byte >= 0x80:
            return bytes([byte])
        text = self._join(piece, _RIGHT)
        return text[: len(text) - len(self._after)].encode() if text.endswith(self._after) else piece.encode()

    def is_byte(self, token: int) -> bool:
        """Whether this is a byte-fallback token such as <0xE4>, one byte of a character."""
        piece = self._tokenizer.id_to_token(token) if self.byte_fallback else None
        return piece is not None and byte_of(piece) is not None

    def _byte_level(self, piece: str) -> bytes:
        alphabet = self._bytes_of_characters
        assert alphabet is not None
        if all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        return piece.encode()  # an added token whose text is no row of bytes

    def _join(self, *pieces: str) -> str:
        """The text of pieces, as the tokenizer decodes them."""
        return " ".join(pieces) if self._decoder is None else self._decoder.decode(list(pieces))


def byte_of(piece: str) -> int | None:
    """The byte that a byte-fallback piece such as <0xE4> stands for, or None."""
    found = BYTE_PIECE.fullmatch(piece)
    return None if found is None else int(found[1], 16)


class Offsets:
    """Where each token of a text begins in it, in characters: of a token that begins inside a character, where that
    character begins. Of a run of byte-fallback tokens that is known when the run ends, because a run that is no UTF-8
    becomes a replacement character per byte.
    """

    def __init__(self, token_bytes: TokenBytes):
        self._bytes = token_bytes
        self._count = 0  # characters before what is open
        self._open = b""  # bytes of a character that is not complete, or a run of byte-fallback tokens
        self._waiting: list[int] = []  # tokens of the run, as how many of its bytes come before each
        self._begun = False

    def push(self, token: int, shown: bool = True) -> list[int]:
        """The next token; returns the offsets that are known now, in the order of the tokens. shown: whether the text
        has it."""
        if not shown:
            return self._nothing()
        data = self._bytes.of(token) if self._begun else self._bytes.first(token)
        self._begun = True
        if self._bytes.is_byte(token):
            self._waiting.append(len(self._open))
            self._open += data
            return []
        return [*self.flush(), self._place(data)]

    def flush(self) -> list[int]:
        """The offsets that are still unknown, at the end of the text."""
        if not self._bytes.byte_fallback:
            return []
        run, self._open = self._open, b""
        waiting, self._waiting = self._waiting, []
        starts = _characters(run)
        known = [self._count + bisect_right(starts, at) - (at < len(run)) for at in waiting]
        self._count += len(starts)
        return known

    def _nothing(self) -> list[int]:
        if self._waiting:
            self._waiting.append(len(self._open))
            return []
        return [self._count]

    def _place(self, data: bytes) -> int:
        """Where bytes that come now begin; they are text from now on."""
        offset = self._count
        if self._open and data and not _goes_on(self._open + data[:1]):
            offset += 1
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._count += len(decoder.decode(self._open + data))
        self._open = decoder.getstate()[0]
        return offset


def _goes_on(data: bytes) -> bool:
    """Whether bytes are the beginning of a character, or one."""
    try:
        codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def _characters(run: bytes) -> list[int]:
    """Where the characters of a run of byte-fallback tokens begin."""
    try:
        run.decode()
    except UnicodeDecodeError:
        return list(range(len(run)))
    return [at for at, byte in enumerate(run) if byte & 0xC0 != 0x80]


def _steps(decoder: dict[str, Any]) -> Iterator[str]:
    """The names of a decoder's steps."""
    yield decoder["type"]
    for step in decoder.get("decoders", ()):
        yield from _steps(step)


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte. Printable bytes of Latin-1 stand for themselves, the others for U+0100 and on, in order."""
    characters = set(pre_tokenizers.ByteLevel.alphabet())
    itself = {character: ord(character) for character in characters if ord(character) < 0x100}
    others = sorted(characters - itself.keys())
    rest = sorted(set(range(0x100)) - set(itself.values()))
    return itself | dict(zip(others, rest, strict=True))
