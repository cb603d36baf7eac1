"""The bytes that single tokens add to a text, and where each token begins in it."""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LEFT, _RIGHT = "q", "z"  # neighbours that no decoder changes, to decode a token in mid-text


class TokenBytes:
    """The bytes that each token adds to a text.

    ``b"".join(map(token_bytes.of, ids))`` is the UTF-8 of what ``Tokenizer.decode`` returns for these ids, with two
    exceptions: the first token, whose bytes ``first`` returns, and invalid UTF-8, which decode() replaces.

    A token's bytes depend on the tokenizer's decoder. In a byte-level vocabulary each character stands for a byte; with
    ByteFallback a token such as <0xE4> is one byte. For other decoders (U+2581 becomes a space, "##" is dropped, words
    are joined with spaces) the token is decoded between two neighbours. Special tokens give the bytes of their text,
    although texts usually omit them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._decoder = tokenizer, tokenizer.decoder
        steps = set() if self._decoder is None else set(_steps(json.loads(self._decoder.__getstate__())))
        self._bytes_of_characters = _byte_level_alphabet() if "ByteLevel" in steps else None
        self.byte_fallback = "ByteFallback" in steps
        self._before = self._join(_LEFT)
        self._after = self._join(_LEFT, _RIGHT)[len(self._before) :]

    def of(self, token: int) -> bytes:
        """Return the bytes that a token adds in the middle of a text; b"" for an id without a token."""
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
        """Return the bytes of a token at the start of a text, where many decoders drop a space."""
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
        """Return whether this is a byte-fallback token such as <0xE4>."""
        piece = self._tokenizer.id_to_token(token) if self.byte_fallback else None
        return piece is not None and byte_of(piece) is not None

    def _byte_level(self, piece: str) -> bytes:
        alphabet = self._bytes_of_characters
        assert alphabet is not None
        if all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        return piece.encode()  # an added token, whose text is not in the byte alphabet

    def _join(self, *pieces: str) -> str:
        """Decode vocabulary entries to text."""
        return " ".join(pieces) if self._decoder is None else self._decoder.decode(list(pieces))


def byte_of(piece: str) -> int | None:
    """Return the byte that a byte-fallback token such as <0xE4> stands for, or None."""
    found = BYTE_PIECE.fullmatch(piece)
    return None if found is None else int(found[1], 16)


class Offsets:
    """The character offset of each token in a text. A token that begins inside a character gets that character's
    offset.

    The offsets of a run of byte-fallback tokens are known when the run ends, because a run that is invalid UTF-8
    becomes one replacement character per byte.
    """

    def __init__(self, token_bytes: TokenBytes, begun: bool = False, open: bytes = b""):
        """``begun``, ``open``: whether the text continues another, and the part of a character that it begins with."""
        self._bytes = token_bytes
        self._count = 0  # characters before ``_open``
        self._open = open  # bytes of an incomplete character or of a byte-fallback run
        self._waiting: list[int] = []  # per token of the run: the run's bytes before it
        self._begun = begun

    def push(self, token: int, shown: bool = True) -> list[int]:
        """Add a token. Return the offsets that are now known, in the order of the tokens. ``shown``: whether the text
        includes it."""
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
        """Return the remaining offsets at the end of the text."""
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
        """Append bytes to the text. Return their offset."""
        offset = self._count
        if self._open and data and not _goes_on(self._open + data[:1]):
            offset += 1
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._count += len(decoder.decode(self._open + data))
        self._open = decoder.getstate()[0]
        return offset


def _goes_on(data: bytes) -> bool:
    """Return whether bytes are a character or the beginning of one."""
    try:
        codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def _characters(run: bytes) -> list[int]:
    """Return where the characters of a byte-fallback run begin."""
    try:
        run.decode()
    except UnicodeDecodeError:
        return list(range(len(run)))
    return [at for at, byte in enumerate(run) if byte & 0xC0 != 0x80]


def _steps(decoder: dict[str, Any]) -> Iterator[str]:
    """Yield the names of a decoder's steps."""
    yield decoder["type"]
    for step in decoder.get("decoders", ()):
        yield from _steps(step)


def _byte_level_alphabet() -> dict[str, int]:
    """Return character -> byte. Printable Latin-1 bytes stand for themselves, the others for U+0100 and following, in
    order."""
    characters = set(pre_tokenizers.ByteLevel.alphabet())
    itself = {character: ord(character) for character in characters if ord(character) < 0x100}
    others = sorted(characters - itself.keys())
    rest = sorted(set(range(0x100)) - set(itself.values()))
    return itself | dict(zip(others, rest, strict=True))
