"""Logprobs in replies: every token has its own bytes, its own text and its own place, streamed and not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from melt_runtime import GenerationOptions, Logprobs, TextDelta
from melt_runtime.decoding.generator import TokenSequence
from melt_runtime.decoding.settings import LoopSettings
from melt_runtime.results import Generation
from melt_runtime.server.replies import ReplyFormat, StreamedChoice
from melt_runtime.text.tokenizer import TextTokenizer
from test_text import byte_fallback, byte_id, byte_level
from tokenizers import Tokenizer


class Row:
    """Logits after which a known token is drawn; the lowest ids are the likeliest."""

    def __init__(self, token: int, vocab: int):
        self.values = np.linspace(0, -1, vocab, dtype=np.float32)
        self.token = token

    def sample(self, row: int, sampler: Any, history: Any) -> int:
        return self.token

    def row(self, slot: int) -> Any:
        return self.values


def draw(tokenizer: TextTokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[TextDelta], Generation]:
    """The deltas of a sequence that draws these tokens."""
    options = GenerationOptions(LoopSettings(1), max_tokens=len(ids), stop=stop)
    sequence = TokenSequence(0, [1], options, tokenizer, logprobs=3)
    deltas: list[TextDelta] = []
    for token in ids:
        if sequence.finish_reason is None:
            deltas.append(sequence.sample(Row(token, tokenizer.vocab_size), 100, 1))  # type: ignore[arg-type]
    return deltas, sequence.result([1] * len(deltas))


def form(tokenizer: Tokenizer, chat: bool) -> ReplyFormat:
    return ReplyFormat(chat, "1", "model", "print", TextTokenizer(tokenizer))


def both(chosen: ReplyFormat, deltas: list[TextDelta], end: Generation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A choice told in parts, and at once."""
    stream = StreamedChoice(chosen, 0)
    *most, last = deltas
    return [*(stream.part(delta) for delta in most), stream.part(last, end)], chosen.whole(0, deltas, end)


def completion(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> dict[str, Any]:
    """The logprobs of a completion, which are the same streamed and not."""
    deltas, end = draw(TextTokenizer(tokenizer), ids, stop)
    parts, whole = both(form(tokenizer, False), deltas, end)
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [one for part in parts if part["logprobs"] for one in part["logprobs"][name]] == values
    return dict(whole["logprobs"])


def chat(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[dict[str, Any]], str]:
    """The entries of a chat, which are the same streamed and not, and its text."""
    deltas, end = draw(TextTokenizer(tokenizer), ids)
    parts, whole = both(form(tokenizer, True), deltas, end)
    entries = whole["logprobs"]["content"]
    assert [entry for part in parts for entry in part["logprobs"]["content"]] == entries
    return entries, whole["message"]["content"]


def test_a_token_that_is_part_of_a_character_has_its_own_bytes() -> None:
    tokenizer = TextTokenizer(byte_level())
    entries, text = chat(byte_level(), [byte_id(tokenizer, byte) for byte in "😀".encode()])
    assert [entry["bytes"] for entry in entries] == [[240], [159], [152], [128]]
    assert [entry["token"] for entry in entries] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80"]
    assert text == "😀"


@pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=lambda make: make.__name__)
def test_joined_bytes_are_the_text(make: Any) -> None:
    entries, text = chat(make(), TextTokenizer(make()).encode("two words 日本 😀 naïve", add_special_tokens=False))
    assert text == "two words 日本 😀 naïve"
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode().removeprefix(" ") == text
    assert all(entry["token"].encode() == bytes(entry["bytes"]) or "bytes:" in entry["token"] for entry in entries)


def test_a_piece_keeps_its_leading_space() -> None:
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(delta) for delta in ("th", "▁", "th", "▁▁", "a")]
    assert completion(tokenizer, ids)["tokens"] == ["th", " ", "th", "  ", "a"]


def test_likeliest_tokens_with_the_same_text_are_all_told() -> None:
    tokenizer = byte_fallback()
    letter, byte = tokenizer.token_to_id("a"), tokenizer.token_to_id("<0x61>")
    chosen = form(tokenizer, False)
    top = ((letter, -0.5), (byte, -1.0), (100_000, -2.0), (100_001, -3.0))
    delta = TextDelta(0, "a", letter, "length", 1, Logprobs(-0.5, top))
    end = Generation("a", (letter,), "length", 1, (1,), 1)
    found = chosen.whole(0, [delta], end)["logprobs"]["top_logprobs"]
    assert found == [{"a": -0.5, f"token_id:{byte}": -1.0, "token_id:100000": -2.0, "token_id:100001": -3.0}]


def test_offsets_are_each_tokens_own_place() -> None:
    tokenizer = byte_fallback()
    deltas = ["<0xF2>", "th", "<0x0F>", "<0x0E>", "<0x47>", "a"]
    found = completion(tokenizer, [tokenizer.token_to_id(delta) for delta in deltas])
    assert found["text_offset"] == [0, 1, 3, 4, 5, 6]
    assert found["tokens"] == ["bytes:\\xf2", "th", "\x0f", "\x0e", "G", "a"]


def test_offsets_do_not_wait_for_text_that_a_stop_string_holds_back() -> None:
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(delta) for delta in ("a", "b", "th", "c", "d")]
    assert completion(tokenizer, ids, ("bthx",))["text_offset"] == [0, 1, 2, 4, 5]
    assert completion(tokenizer, ids, ("bthc",))["text_offset"] == [0, 1, 2, 4]


def test_a_special_token_is_told_by_its_text() -> None:
    tokenizer = byte_fallback()
    found = completion(tokenizer, [tokenizer.token_to_id("a"), 2])
    assert (found["tokens"], found["text_offset"]) == (["a", "</s>"], [0, 1])
