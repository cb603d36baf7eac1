"""The text side of a package: loading, chat templates, and streaming that equals decoding at once."""

import json
from collections.abc import Iterable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from melt_runtime.errors import ArgumentError, PackageError, PromptError
from melt_runtime.text.stream_decoder import StreamDecoder
from melt_runtime.text.tokenizer import TextTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces",
    "日本語と中文の文字。",
    "😀 👩‍👩‍👧 🏳️‍🌈 naïve café\n",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]

valid = st.characters(codec="utf-8", exclude_characters="\ufffd▁")
relaxed = settings(deadline=None)  # the first example also trains the tokenizer


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens([AddedToken("<|not special|>", special=False)])
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """Like the tokenizers of Llama 2: every unknown character becomes the tokens of its bytes."""
    pieces = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz.",
        "▁▁",
        "th",
        "日",
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab, [("▁", "▁"), ("t", "h")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


@cache
def characters() -> Tokenizer:
    vocab = {piece: number for number, piece in enumerate([*SPECIAL, *sorted(set("".join(LINES))), "�"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@cache
def words() -> Tokenizer:
    """No decoder at all: decode() joins the tokens with spaces."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4, "�": 5}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@cache
def word_pieces() -> Tokenizer:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "un": 3, "##happy": 4, ".": 5, "n": 6, "'": 7, "##t": 8, "do": 9}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@cache
def word_ends() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "a</w>": 5, "b</w>": 6}, []))
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


ALL = [byte_level, byte_fallback, metaspace, characters, words, word_pieces, word_ends]
every_tokenizer = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
lossless = pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=lambda make: make.__name__)


def stream(tokenizer: TextTokenizer, ids: Iterable[int], skip_special_tokens: bool = True) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip_special_tokens)
    pieces = [decoder.push(token_id) for token_id in ids]
    return [*pieces, decoder.flush()]


def package(directory: Path, config: Any = None, template: str | None = None) -> Path:
    byte_level().save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def chat(template: str, messages: Any = ({"role": "user", "content": "Hi"},), **options: Any) -> str:
    tokenizer = TextTokenizer(byte_level(), {"bos_token": "<s>", "eos_token": "</s>"}, template)
    return tokenizer.render_chat(messages, **options)


@every_tokenizer
@relaxed
@given(text=st.text(max_size=60))
def test_streaming_random_text_equals_decoding_it(make: Any, text: str) -> None:
    tokenizer = TextTokenizer(make())
    ids = tokenizer.backend_tokenizer.encode(text).ids
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@every_tokenizer
@relaxed
@given(data=st.data(), skip=st.booleans())
def test_streaming_random_ids_equals_decoding_them(make: Any, data: st.DataObject, skip: bool) -> None:
    tokenizer = TextTokenizer(make())
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=80))
    assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@lossless
@relaxed
@given(data=st.binary(max_size=80))
def test_streaming_bytes_that_are_not_utf8_equals_decoding_them(make: Any, data: bytes) -> None:
    tokenizer = TextTokenizer(make())
    ids = [byte_id(tokenizer, byte) for byte in data]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@lossless
@relaxed
@given(text=st.text(st.sampled_from("a é日😀\u0301\n") | valid, max_size=40))
def test_no_piece_holds_part_of_a_character(make: Any, text: str) -> None:
    tokenizer = TextTokenizer(make())
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text


@pytest.mark.parametrize("text", ["�", "��", "a�b", "�" * 50, " � "])
@every_tokenizer
def test_text_that_really_has_replacement_characters_streams_whole(make: Any, text: str) -> None:
    tokenizer = TextTokenizer(make())
    ids = tokenizer.backend_tokenizer.encode(text).ids
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def byte_id(tokenizer: TextTokenizer, byte: int) -> int:
    found = tokenizer.token_id(f"<0x{byte:02X}>")
    if found is None:
        # Printable bytes stand for themselves in a byte-level vocabulary, the others follow from U+0100 in order.
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in plain]
        found = tokenizer.token_id(chr(byte) if byte in plain else chr(256 + others.index(byte)))
    assert found is not None
    return found


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = TextTokenizer(byte_level())
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(byte_id(tokenizer, byte)) for byte in "é🦊".encode()] == ["", "é", "", "", "", "🦊"]


def test_an_incomplete_character_is_given_by_flush() -> None:
    tokenizer = TextTokenizer(byte_level())
    ids = [byte_id(tokenizer, byte) for byte in b"a\xf0\x9f"]
    assert stream(tokenizer, ids) == ["a", "", "", "�"]


def test_a_leading_space_that_decode_drops_is_dropped_once() -> None:
    tokenizer = TextTokenizer(byte_fallback())
    ids = tokenizer.encode("a b  c")
    assert [piece for piece in stream(tokenizer, ids) if piece] == ["a", " ", "b", "  ", "c"]


def test_many_skipped_tokens_do_not_make_the_next_one_first() -> None:
    tokenizer = TextTokenizer(byte_fallback())
    assert "".join(stream(tokenizer, [*tokenizer.encode("a"), *[2] * 40, *tokenizer.encode("b")])) == "a b"


def test_special_tokens_are_streamed_when_asked_for() -> None:
    tokenizer = TextTokenizer(byte_level())
    ids = [1, *tokenizer.encode("a"), 2]
    assert "".join(stream(tokenizer, ids)) == "a"
    assert "".join(stream(tokenizer, ids, skip_special_tokens=False)) == "<s>a</s>"


def test_after_flush_a_new_text_begins() -> None:
    tokenizer = TextTokenizer(byte_fallback())
    ids = tokenizer.encode("a b")
    decoder = StreamDecoder(tokenizer)
    first = "".join(map(decoder.push, ids)) + decoder.flush()
    assert "".join(map(decoder.push, ids)) + decoder.flush() == first == "a b"


@every_tokenizer
@relaxed
@given(text=st.text(valid, max_size=20))
def test_a_text_that_is_settled_between_words_goes_on_as_one(make: Any, text: str) -> None:
    tokenizer = TextTokenizer(make())
    decoder, found, ids = StreamDecoder(tokenizer), "", []
    for word in ("one ", text, " two", "."):
        for token_id in tokenizer.backend_tokenizer.encode(word, add_special_tokens=False).ids:
            ids.append(token_id)
            found += decoder.push(token_id)
        found += decoder.settle()
    assert found + decoder.flush() == tokenizer.decode(ids)


class CountingTokenizer(TextTokenizer):
    """Remembers how many ids each decode() was asked for."""

    longest = 0

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        ids = list(ids)
        self.longest = max(self.longest, len(ids))
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize("data", [b"plain text ", b"\x80", b"\xf0", "日".encode(), b"\xe6\x97", b"\xf0\x9f\x98"])
def test_a_push_never_decodes_more_than_a_short_window(data: bytes) -> None:
    tokenizer = CountingTokenizer(byte_level())
    ids = [byte_id(tokenizer, byte) for byte in data * (600 // len(data))]
    pieces = stream(tokenizer, ids)
    assert tokenizer.longest <= 16
    assert "".join(pieces) == tokenizer.decode(ids)


def test_text_flows_when_every_token_ends_inside_a_character() -> None:
    # Tokens such as "last bytes of one character, first byte of the next" never leave a clean end.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)}
    head, middle, tail = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("日")[0][0]
    vocab |= {middle + tail: 256, middle + tail + head: 257}
    bpe = Tokenizer(models.BPE(vocab, [(middle, tail), (middle + tail, head)]))
    bpe.decoder = decoders.ByteLevel()
    tokenizer = CountingTokenizer(bpe)
    pieces = stream(tokenizer, [vocab[head], *[257] * 100, 256])
    assert pieces == ["", *["日"] * 101, ""]
    assert tokenizer.longest <= 16


def test_special_tokens_around_the_text_can_be_left_out() -> None:
    tokenizer = TextTokenizer(byte_fallback())
    assert tokenizer.encode("a") == [1, *tokenizer.encode("a", add_special_tokens=False)]


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    plain = tokenizer.encode("The quick brown fox").ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextTokenizer.load(tmp_path).encode("The quick brown fox") == plain


def test_text_with_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(PromptError, match="character 2"):
        TextTokenizer(byte_level()).encode("ab\ud800")


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_impossible_ids_are_refused(bad: int) -> None:
    tokenizer = TextTokenizer(byte_level())
    with pytest.raises(PromptError, match="from 0 to"):
        tokenizer.decode([bad])
    with pytest.raises(PromptError, match="from 0 to"):
        StreamDecoder(tokenizer).push(bad)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"no tokenizer\.json"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b'{"bos_token": 3}'),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b'{"chat_template": "{% if %}"}'),
        ("chat_template.jinja", b"{{ unclosed"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (package(tmp_path) / name).write_bytes(content)
    with pytest.raises(PackageError):
        TextTokenizer.load(tmp_path)


def test_a_tokenizer_alone_is_enough_but_gives_no_chat(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(package(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(ArgumentError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "Hi"}])


def test_tokens_may_be_text_or_dicts(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(
        package(tmp_path, {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}})
    )
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}!", [{"name": "tools", "template": "no"}, {"name": "default", "template": "<s>!"}]]
)
def test_the_template_of_the_config_is_used(tmp_path: Path, template: Any) -> None:
    tokenizer = TextTokenizer.load(package(tmp_path, {"bos_token": "<s>", "chat_template": template}))
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "<s>!"


def test_a_list_of_templates_without_a_default_gives_no_chat(tmp_path: Path) -> None:
    config = {"chat_template": [{"name": "tools", "template": "no"}]}
    assert not TextTokenizer.load(package(tmp_path, config)).has_chat_template


def test_the_template_file_wins_over_the_config(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(package(tmp_path, {"chat_template": "config"}, "file"))
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "file"


def test_a_chat_is_rendered_turn_by_turn() -> None:
    template = """{% for message in messages %}
    {% if loop.first %}{{ bos_token }}{% endif %}
[{{ message.role }}]{{ message['content'] }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
[assistant]{% endif %}"""
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "日本 <b>"}]
    expected = "<s>[system]Be kind.</s>\n[user]日本 <b></s>\n"
    assert chat(template, messages) == expected + "[assistant]"
    assert chat(template, messages, add_generation_prompt=False) == expected


def test_json_in_a_template_is_not_escaped() -> None:
    assert chat("{{ {'a': '<é & \"q\">'} | tojson }}") == '{"a": "<é & \\"q\\">"}'
    assert chat("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"


def test_a_template_can_ask_for_the_date() -> None:
    years = {datetime.now().strftime("%Y"), chat("{{ strftime_now('%Y') }}")}
    assert len(years) == 1


def test_loop_controls_and_generation_blocks_are_understood() -> None:
    assert chat("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert chat("{% generation %}{{ messages[0].content }}{% endgeneration %}.") == "Hi."


def test_a_template_that_refuses_the_messages_says_why() -> None:
    with pytest.raises(PromptError, match="roles must alternate"):
        chat("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ 1 + 'a' }}", "{{ nothing.x }}"],
)
def test_a_template_that_fails_or_leaves_the_sandbox_is_the_fault_of_the_package(template: str) -> None:
    with pytest.raises(PackageError, match="chat template of this package failed"):
        chat(template)


@pytest.mark.parametrize(
    "messages",
    ["Hi", {"role": "user", "content": "Hi"}, 3, [], ["Hi"], [{"role": "user"}], [{"role": None, "content": "Hi"}]],
)
def test_malformed_messages_are_refused(messages: Any) -> None:
    with pytest.raises(PromptError, match="message"):
        chat("{{ messages }}", messages)
