"""Text that continues a prompt: exactly what its tokens add to the prompt's text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, MakePackage
from hypothesis import given
from hypothesis import strategies as st
from melt_runtime import Runtime
from melt_runtime.results import Generation, Logprobs, TextDelta
from melt_runtime.server.replies import Echo, ReplyFormat, StreamedChoice
from melt_runtime.text.stream_decoder import StreamDecoder
from melt_runtime.text.text_before import closed_text
from melt_runtime.text.tokenizer import TextTokenizer
from test_grammar import END, allowed_after, grammars
from test_text import byte_fallback, byte_id, byte_level, every_tokenizer, lossless, metaspace, relaxed, valid, words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

spaces_first = pytest.mark.parametrize("make", [byte_fallback, metaspace, words], ids=lambda make: make.__name__)


def added(tokenizer: TextTokenizer, prompt: list[int], ids: list[int], **how: Any) -> str:
    """The text that tokens after a prompt are streamed as."""
    decoder = StreamDecoder(tokenizer, prompt=prompt, **how)
    return "".join(map(decoder.push, ids)) + decoder.flush()


def id_of(tokenizer: TextTokenizer, piece: str) -> int:
    found = tokenizer.token_id(piece)
    assert found is not None
    return found


@every_tokenizer
@relaxed
@given(text=st.text(st.sampled_from("ab th日\n.😀") | valid, max_size=60), at=st.integers(0, 60), skip=st.booleans())
def test_a_continuation_is_what_it_adds_to_the_prompt(make: Any, text: str, at: int, skip: bool) -> None:
    tokenizer = TextTokenizer(make())
    ids = tokenizer.backend_tokenizer.encode(text).ids
    prompt, rest = ids[:at], ids[at:]
    before, whole = tokenizer.decode(prompt, skip), tokenizer.decode(ids, skip)
    if "\ufffd" in before or not whole.startswith(before):  # the prompt ends inside a character
        return
    assert added(tokenizer, prompt, rest, skip_special_tokens=skip) == whole[len(before) :]


@spaces_first
def test_a_word_after_a_prompt_keeps_its_space_and_at_the_beginning_it_has_none(make: Any) -> None:
    tokenizer = TextTokenizer(make())
    word = id_of(tokenizer, "two") if make is words else id_of(tokenizer, "▁")
    then = [] if make is words else [id_of(tokenizer, "t")]
    first = id_of(tokenizer, "one") if make is words else id_of(tokenizer, "o")
    text = "two" if make is words else "t"
    assert added(tokenizer, [first], [word, *then]) == f" {text}"
    assert added(tokenizer, [first, *[1] * 40], [word, *then]) == f" {text}"  # behind special tokens, too
    assert added(tokenizer, [], [word, *then]) == added(tokenizer, [1], [word, *then]) == text


@lossless
@relaxed
@given(text=st.text(st.sampled_from("aé日😀\ufffd") | valid, min_size=1, max_size=12), data=st.data())
def test_prompt_and_continuation_make_the_whole_text_wherever_a_character_is_cut(
    make: Any, text: str, data: st.DataObject
) -> None:
    tokenizer = TextTokenizer(make())
    ids = [id_of(tokenizer, "a"), *(byte_id(tokenizer, byte) for byte in text.encode())]
    at = data.draw(st.integers(1, len(ids)))
    assert closed_text(tokenizer, ids[:at]) + added(tokenizer, ids[:at], ids[at:]) == f"a{text}"


def test_a_prompt_that_ends_in_a_replacement_character_keeps_it() -> None:
    for make in (byte_level, byte_fallback):
        tokenizer = TextTokenizer(make())
        ids = [byte_id(tokenizer, byte) for byte in "a\ufffdb".encode()]
        assert added(tokenizer, ids[:-1], ids[-1:]) == "b"


def test_a_character_that_the_prompt_begins_and_nothing_ends_is_told_once() -> None:
    for make in (byte_level, byte_fallback):
        tokenizer = TextTokenizer(make())
        prompt, rest = [id_of(tokenizer, "a"), byte_id(tokenizer, 0xE6)], [id_of(tokenizer, "b")]
        assert closed_text(tokenizer, prompt) == "a"
        assert added(tokenizer, prompt, rest) == "\ufffdb"


def test_a_word_after_a_special_token_that_is_written_out_keeps_its_space() -> None:
    tokenizer = TextTokenizer(metaspace())
    ids = [1, id_of(tokenizer, "▁"), id_of(tokenizer, "t")]
    assert added(tokenizer, [], ids, shown={1}) == tokenizer.decode(ids, skip_special_tokens=False) == "<s> t"


@pytest.mark.parametrize("echoed", [False, True])
@pytest.mark.parametrize("make", [byte_fallback, metaspace, byte_level], ids=lambda make: make.__name__)
def test_text_offsets_of_a_completion_stand_where_its_tokens_do(make: Any, echoed: bool) -> None:
    tokenizer = TextTokenizer(make())
    space = id_of(tokenizer, "Ġ" if make is byte_level else "▁")
    prompt, ids = [id_of(tokenizer, "o")], [space, id_of(tokenizer, "t"), space, id_of(tokenizer, "h")]
    known = Logprobs(-1.0, ())
    decoder = StreamDecoder(tokenizer, prompt=prompt)
    deltas = [TextDelta(0, decoder.push(token), token, None, 1, known) for token in ids]
    end = Generation("".join(delta.text for delta in deltas), tuple(ids), "length", 1, (1,) * 5, 1)
    echo = Echo("o", prompt, [None]) if echoed else None
    form = ReplyFormat(False, "1", "model", "print", tokenizer)
    whole = form.whole(0, deltas, end, echo, prompt)
    stream = StreamedChoice(form, 0, lambda: echo, prompt)
    parts = [*map(stream.part, deltas[:-1]), stream.part(deltas[-1], end)]
    begun = "o" if echoed else ""
    assert whole["text"] == "".join(part["text"] for part in parts) == f"{begun} t h"
    places = [len(begun) + at for at in range(4)]
    assert whole["logprobs"]["text_offset"] == ([0] if echoed else []) + places
    assert [at for part in parts for at in part["logprobs"]["text_offset"]] == whole["logprobs"]["text_offset"]


def test_json_after_a_prompt_begins_without_the_space_that_a_text_would_drop() -> None:
    tokenizer, made = grammar_tokenizer(), grammars(grammar_tokenizer)
    (alone,) = made.constraints({"const": "a"}, 1)
    (after,) = made.constraints({"const": "a"}, 1, begun=[True])
    assert allowed_after(alone, tokenizer) == {'"', '▁"'}
    assert allowed_after(after, tokenizer) == {'"'}


def grammar_tokenizer() -> Tokenizer:
    vocab = {piece: at for at, piece in enumerate(["<unk>", END, '"', '▁"', "a", "▁"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", '"')], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens([END])
    return tokenizer


@pytest.fixture(scope="module")
def runtime(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, tmp_path_factory: pytest.TempPathFactory
) -> Runtime:
    """A model most of whose tokens begin with a space."""
    copy = Path(shutil.copytree(make_checkpoint(), tmp_path_factory.mktemp("spaces") / "checkpoint"))
    pieces = ["<pad>", "<end>", "<unk>", "▁", *(f"▁{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocab = {piece: at for at, piece in enumerate([*pieces, *"abcdefghijklmnopqrst"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "<end>"])
    tokenizer.save(str(copy / "tokenizer.json"))
    return Runtime.load(make_package(copy))


def test_every_way_to_generate_gives_what_the_tokens_add_to_the_prompt(runtime: Runtime) -> None:
    tokenizer = runtime.tokenizer
    assert tokenizer is not None
    prompt = "a b c"
    ids = runtime.encode(prompt)
    first = dict.fromkeys(range(4, 30), 100.0)  # so that every token begins with a space
    options: dict[str, Any] = {"max_tokens": 12, "logit_bias": first, "ignore_eos": True}
    result = runtime.generate(prompt, **options)
    right = tokenizer.decode([*ids, *result.token_ids])[len(tokenizer.decode(ids)) :]
    assert right.startswith(" ")
    assert len(right) == 24
    assert result.text == "".join(runtime.stream(prompt, **options)) == right
    session = runtime.session(**options)
    session.append(prompt)
    told = session.generate(max_tokens=6).text + "".join(session.stream(max_tokens=6))
    assert told == right
