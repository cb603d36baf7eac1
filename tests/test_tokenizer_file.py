"""tokenizer.json from anyone: no panic, no death of the process, nothing on standard error; one sentence."""

import base64
import json
import os
import resource
import subprocess
import sys
from typing import Any

import pytest
from melt_runtime.text.tokenizer_file import tokenizer_of
from melt_runtime.text.tokenizer_limits import MOST_VALUES

WORDS = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2}, "unk_token": "<unk>"}


def text(model: dict[str, Any] | None = None, **parts: Any) -> str:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return json.dumps({"version": "1.0", "added_tokens": [], **empty, "model": model or WORDS, **parts})


def pairs(vocab: list[str], merge: object, prefix: str | None) -> str:
    numbers = {token: number for number, token in enumerate(vocab)}
    return text({"type": "BPE", "vocab": numbers, "merges": [merge], "continuing_subword_prefix": prefix})


def steps(name: str, *inner: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: list(inner)}


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def charsmap(longest: str) -> dict[str, Any]:
    content = (1024).to_bytes(4, "little") + bytes(1024) + longest.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def template(pieces: list[str], ids: int = 1, **special: Any) -> dict[str, Any]:
    """Pieces that are A or B are texts, the others special tokens, each of so many ids."""
    tokens = {name: {"id": name, "ids": [1] * ids, "tokens": ["a"] * ids} for name in set(pieces) - {"A", "B"}}
    single = [{"Sequence" if name in "AB" else "SpecialToken": {"id": name, "type_id": 0}} for name in pieces]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    whole = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
    return {**whole, **special}


# The library panics over the first, and over half a character it ends the process.
BROKEN = {
    "charsmap": text(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
    "a merged token that is not there": pairs(["a", "b"], ["a", "b"], None),
    "a merge in the old form": pairs(["a", "b"], "a b", ""),
    "a token shorter than the prefix": pairs(["é", "b", "éb"], "é b", "##"),
    "half a character": pairs(["a", "é", "aé"], ["a", "é"], "x"),
    "a template's token that is not there": text(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "a prefix that is spelled otherwise": pairs(["a", "é", "aé"], ["a", "é"], "x").replace("con", "\\u0063on"),
    "a model named twice": pairs(["a", "é", "aé"], ["a", "é"], "x")[:-1] + f', "model": {json.dumps(WORDS)}}}',
    "a regular expression": text(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(((("}, "behavior": "Isolated", "invert": False}
    ),
    "no tokenizer": "[" * 100_000,
    "no JSON": "{",
}


BYTES_AGAIN = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
SPACED = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
LONG = "a" * (50 << 20)
# A part, and what the sentence names. Each took gigabytes, half a minute or the process.
BOMBS = {
    "a normalizer of replacements": (
        text(normalizer=steps("normalizers", *[replace("a", "a" * 100)] * 5)),
        "8,192 times as long",
    ),
    "replacements in nested sequences": (
        text(normalizer=steps("normalizers", *[steps("normalizers", replace("a", "a" * 100))] * 5)),
        "8,192 times as long",
    ),
    "replacements between characters": (
        text(normalizer=steps("normalizers", *[replace("", "a", "Regex")] * 40)),
        "8,192 times as long",
    ),
    "a replacement of nothing": (
        text(normalizer=replace("", "a" * 10_000, "Regex")),
        "its normalizer, pre_tokenizer and post_processor may make",
    ),
    "a step without a type": (
        text(normalizer={"normalizers": [{"pattern": {"String": "a"}, "content": "a" * 10_000}]}),
        "its normalizer, pre_tokenizer and post_processor may make",
    ),
    "prepended megabytes": (
        text(normalizer=steps("normalizers", *[{"type": "Prepend", "prepend": "a" * 60_000}] * 8)),
        "8,192 times as long",
    ),
    "a charsmap": (text(normalizer=charsmap("a" * 10_000)), "8,192 times as long"),
    "pre-tokenizers that spell bytes again": (
        text(pre_tokenizer=steps("pretokenizers", *[BYTES_AGAIN] * 40)),
        "8,192 times as long",
    ),
    "a decoder of replacements": (
        text(decoder=steps("decoders", *[replace("a", "a" * 100)] * 5)),
        "its decoder may make a text more than 8,192 times as long",
    ),
    "a decoder that looks for nothing": (
        text(decoder=steps("decoders", *[{"type": "BPEDecoder", "suffix": ""}] * 40)),
        "its decoder may make a text more than 8,192 times as long",
    ),
    "steps without end": (text(normalizer=steps("normalizers", *[{"type": "NFC"}] * 2000)), "1,024 steps"),
    "steps in a list": (text(normalizer=[steps("normalizers", replace("a", "a" * 100))]), "an object, is wanted"),
    "a template of ids": (text(post_processor=template(["A", *["x"] * 200_000], 1000)), "1,024 may be added"),
    "a template of a second text": (text(post_processor=template(["B"])), "names a second one"),
    "a template of texts": (text(post_processor=template(["A"] * 200_000)), "8,192 times as long"),
    "an unknown special token": (
        text(post_processor=template(["x", "A"], special_tokens={})),
        "names the token 'x', which it does not define",
    ),
    "a long token": (text({**WORDS, "vocab": {"<unk>": 0, LONG: 1}}), "52,428,800 characters"),
    "a long added token": (text(added_tokens=[{"id": 3, "content": LONG, "special": True}]), "52,428,800 characters"),
    "a long prefix": (text({**WORDS, "unk_token": LONG}), "52,428,800 characters"),
    "values without end": (text(more=[[]] * (MOST_VALUES // 2)), "the 6,000,000 values"),
}


@pytest.mark.parametrize("fault", BOMBS)
def test_a_tokenizer_that_costs_too_much_is_refused_before_it_is_built(fault: str) -> None:
    content, sentence = BOMBS[fault]
    program = """
import sys
from melt_runtime.text.tokenizer_file import tokenizer_of
try:
    tokenizer_of(sys.stdin.read()).encode("aaaa a")
except ValueError as error:
    print(error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        input=content,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)),
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(ended.stdout.splitlines()) == 1
    assert len(ended.stdout) < 300
    assert sentence in ended.stdout


BYTE_PIECES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
LLAMA = {"<unk>": 0, "<s>": 1, "</s>": 2, **BYTE_PIECES, "▁": 259, "a": 260, "▁a": 261}
USUAL = {
    "byte-level": (
        text(
            {"type": "BPE", "vocab": {"a": 0, "Ġ": 1, "Ġa": 2}, "merges": [["Ġ", "a"]]},
            pre_tokenizer=BYTES_AGAIN,
            decoder=BYTES_AGAIN,
            post_processor=BYTES_AGAIN,
        ),
        [2, 2],
    ),
    "Llama": (
        text(
            {"type": "BPE", "vocab": LLAMA, "merges": ["▁ a"], "unk_token": "<unk>", "byte_fallback": True},
            normalizer=steps("normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")),
            post_processor=steps("processors", BYTES_AGAIN, template(["<s>", "A"])),
            decoder=steps(
                "decoders",
                replace("▁", " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ),
        ),
        [1, 261, 261],
    ),
    "T5": (
        text(
            {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁a", -1.0]], "byte_fallback": False},
            normalizer=steps("normalizers", {"type": "NFKC"}, replace(" {2,}", "▁", "Regex"), {"type": "NFD"}),
            pre_tokenizer=steps("pretokenizers", {"type": "WhitespaceSplit"}, SPACED),
            decoder=SPACED,
            post_processor=template(["A", "</s>"]),
        ),
        [1, 1, 1],
    ),
    "BERT": (
        text(
            {**WORDS, "type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##"}
            | {"max_input_chars_per_word": 100},
            normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
            | {"strip_accents": None, "lowercase": True},
            pre_tokenizer={"type": "BertPreTokenizer"},
            post_processor=template(["[CLS]", "A", "[SEP]"]),
            decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
        ),
        [1, 1, 1, 1],
    ),
}


@pytest.mark.parametrize("kind", USUAL)
def test_the_usual_kinds_are_read(kind: str) -> None:
    content, ids = USUAL[kind]
    assert tokenizer_of(content).encode("a a").ids == ids


def test_the_longest_chain_of_steps_that_is_in_use_is_read() -> None:
    normalizer = steps(
        "normalizers",
        replace("``", '"'),
        replace("''", '"'),
        {"type": "NFKD"},
        {"type": "StripAccents"},
        replace(" {2,}", " ", "Regex"),
    )
    assert tokenizer_of(text(normalizer=normalizer, pre_tokenizer=SPACED)).encode("a").ids == [0]
    longest = steps("normalizers", *normalizer["normalizers"], charsmap("x" * 33))  # as in the usual charsmaps
    assert tokenizer_of(text(normalizer=longest, pre_tokenizer=SPACED)).encode("a").ids == [0]


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_tokenizer_is_one_sentence(fault: str) -> None:
    program = """
import sys
from melt_runtime.text.tokenizer_file import tokenizer_of
try:
    tokenizer_of(sys.stdin.read())
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "RUST_BACKTRACE": "1"}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, input=BROKEN[fault], capture_output=True, text=True, timeout=60, env=environment)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(ended.stdout.splitlines()) == 1
    assert len(ended.stdout) < 300


@pytest.mark.parametrize(
    ("vocab", "merge", "prefix"),
    [(["a", "b", "ab"], ["a", "b"], None), (["a", "b", "ab"], "a b", ""), (["é", "##é", "éé"], ["é", "##é"], "##")],
)
def test_right_merges_are_read(vocab: list[str], merge: object, prefix: str | None) -> None:
    assert tokenizer_of(pairs(vocab, merge, prefix)).get_vocab_size() == 3


def test_a_tokenizer_that_pads_to_a_terabyte_does_not() -> None:
    padding = {
        "strategy": {"Fixed": 10**12},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    assert tokenizer_of(text(padding=padding)).encode("a").ids == [1]


def test_standard_error_is_open_again_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer_of(text())
    with pytest.raises(ValueError, match="Precompiled"):
        tokenizer_of(BROKEN["charsmap"])
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"
