"""The bytes of single tokens: joined they are the text, for every kind of tokenizer; and where each token begins."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from melt_runtime.text.token_bytes import Offsets, TokenBytes
from melt_runtime.text.tokenizer import TextTokenizer
from test_text import ALL, byte_fallback, byte_id, byte_level, metaspace, relaxed
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


@cache
def byte_fallback_without_strip() -> Tokenizer:
    """Like Gemma's: byte fallback, and the first space stays."""
    tokenizer = Tokenizer.from_str(byte_fallback().to_str())
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@cache
def metaspace_that_never_prepends() -> Tokenizer:
    tokenizer = Tokenizer.from_str(metaspace().to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return tokenizer


# A tokenizer whose decoder marks the ends of words drops the space of the last one: only its own text tells.
KINDS = [make for make in ALL if make.__name__ != "word_ends"]
KINDS += [byte_fallback_without_strip, metaspace_that_never_prepends]
every_kind = pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)


def joined(token_bytes: TokenBytes, ids: list[int]) -> bytes:
    return token_bytes.first(ids[0]) + b"".join(map(token_bytes.of, ids[1:])) if ids else b""


@every_kind
@relaxed
@given(text=st.text(max_size=60))
def test_the_bytes_of_the_tokens_of_a_text_are_the_text(make: Any, text: str) -> None:
    tokenizer = TextTokenizer(make())
    ids = [i for i in tokenizer.encode(text, add_special_tokens=False) if tokenizer.shows(i, True)]
    assert joined(tokenizer.token_bytes, ids) == tokenizer.decode(ids).encode()
    assert b"".join(map(tokenizer.token_bytes.of, ids)).lstrip(b" ") == tokenizer.decode(ids).lstrip(" ").encode()


@every_kind
@relaxed
@given(data=st.data())
def test_the_bytes_of_any_tokens_are_what_they_decode_to(make: Any, data: st.DataObject) -> None:
    tokenizer = TextTokenizer(make())
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    text, found = tokenizer.decode(ids, skip_special_tokens=False), joined(tokenizer.token_bytes, ids)
    if not tokenizer.token_bytes.byte_fallback:
        assert found.decode("utf-8", "replace") == text
    elif "\ufffd" not in text:  # else a run of bytes is no UTF-8, and all of it is replaced
        assert found == text.encode()


def test_a_token_that_is_part_of_a_character_has_its_own_bytes() -> None:
    for make in (byte_level, byte_fallback):
        tokenizer = TextTokenizer(make())
        ids = [byte_id(tokenizer, byte) for byte in "🦊".encode()]
        assert [tokenizer.token_bytes.of(i) for i in ids] == [b"\xf0", b"\x9f", b"\xa6", b"\x8a"]


def test_a_piece_keeps_its_space_but_at_the_beginning_of_a_text() -> None:
    vocab = {piece: number for number, piece in enumerate(["<unk>", "▁yes", "yes", "▁", "▁▁a"])}
    for decoder, spaces in [
        (decoders.Metaspace(), b"a"),
        (decoders.Metaspace(prepend_scheme="never"), b"  a"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]), b" a"),
    ]:
        tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
        tokenizer.decoder = decoder
        token_bytes = TokenBytes(tokenizer)
        assert [token_bytes.of(i) for i in (1, 2, 3, 4)] == [b" yes", b"yes", b" ", b"  a"]
        assert token_bytes.first(4) == spaces


def test_added_tokens_have_the_bytes_of_their_text() -> None:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    added = ["<|a b|>", "<｜end▁of▁sentence｜>", "<think>"]
    tokenizer.add_tokens([AddedToken(text, special=number < 2) for number, text in enumerate(added)])
    token_bytes = TokenBytes(tokenizer)
    assert [token_bytes.of(tokenizer.token_to_id(text)) for text in added] == [text.encode() for text in added]


def test_an_id_without_a_token_has_no_bytes() -> None:
    for make in ALL:
        assert TokenBytes(make()).of(100_000) == TokenBytes(make()).first(100_000) == b""


# Offsets


def offsets(tokenizer: TextTokenizer, ids: list[int]) -> list[int]:
    places = Offsets(tokenizer.token_bytes)
    return [place for i in ids for place in places.push(i, tokenizer.shows(i, True))] + places.flush()


def ids_of(tokenizer: TextTokenizer, *pieces: str) -> list[int]:
    return [i for i in map(tokenizer.token_id, pieces) if i is not None]


def test_bytes_that_are_no_character_take_a_place_each() -> None:
    tokenizer = TextTokenizer(byte_fallback())
    ids = ids_of(tokenizer, "<0xF2>", "th", "<0x0F>", "<0x0E>", "<0x47>", "a")
    assert offsets(tokenizer, ids) == [0, 1, 3, 4, 5, 6]
    assert len(tokenizer.decode(ids)) == 7


def test_tokens_of_one_character_begin_where_it_begins() -> None:
    for make in (byte_level, byte_fallback_without_strip):
        tokenizer = TextTokenizer(make())
        ids = [*ids_of(tokenizer, "a"), *(byte_id(tokenizer, byte) for byte in "🦊".encode()), *ids_of(tokenizer, "b")]
        assert offsets(tokenizer, ids) == [0, 1, 1, 1, 1, 2]


def test_the_space_that_a_text_drops_takes_no_place() -> None:
    tokenizer = TextTokenizer(byte_fallback())
    assert offsets(tokenizer, ids_of(tokenizer, "▁", "a", "▁", "b")) == [0, 0, 1, 2]


def test_tokens_that_are_not_shown_stand_where_the_text_goes_on() -> None:
    tokenizer = TextTokenizer(byte_fallback())
    assert offsets(tokenizer, ids_of(tokenizer, "</s>", "a", "<s>", "b", "</s>")) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("make", [byte_level, byte_fallback, *KINDS[-2:]], ids=lambda make: make.__name__)
@relaxed
@given(data=st.data())
def test_every_token_begins_where_the_text_before_it_ends(make: Any, data: st.DataObject) -> None:
    tokenizer = TextTokenizer(make())
    ids = data.draw(st.lists(st.integers(3, tokenizer.vocab_size - 1), max_size=30))
    found = offsets(tokenizer, ids)
    assert len(found) == len(ids)
    assert found == sorted(found)
    if "\ufffd" not in tokenizer.decode(ids):
        assert found == [
            len(joined(tokenizer.token_bytes, ids[:at]).decode("utf-8", "ignore")) for at in range(len(ids))
        ]


def test_offsets_reach_the_end_of_a_text_with_broken_characters() -> None:
    for make in (byte_level, byte_fallback):
        tokenizer = TextTokenizer(make())
        for data in (b"\xf0\x9f\xa6a", b"\xf0\x9f\xf0\x9fa", b"\x80\x80a", b"\xc3\xa9\xc3a", b"\xf0\x9f\xa6\x8a\xe6a"):
            ids = [byte_id(tokenizer, byte) for byte in data[:-1]] + ids_of(tokenizer, "a")
            assert tokenizer.decode(ids)[offsets(tokenizer, ids)[-1] :] == "a"
