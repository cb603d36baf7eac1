"""tokenizer.json from anyone: no panic, no death of the process, nothing on standard error; one sentence."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from melt_runtime.tokenizer_file import tokenizer_of

WORDS = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2}, "unk_token": "<unk>"}


def text(model: dict[str, Any] | None = None, **parts: Any) -> str:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return json.dumps({"version": "1.0", "added_tokens": [], **empty, "model": model or WORDS, **parts})


def pairs(vocab: list[str], merge: object, prefix: str | None) -> str:
    numbers = {token: number for number, token in enumerate(vocab)}
    return text({"type": "BPE", "vocab": numbers, "merges": [merge], "continuing_subword_prefix": prefix})


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


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_tokenizer_is_one_sentence(fault: str) -> None:
    program = """
import sys
from melt_runtime.tokenizer_file import tokenizer_of
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


def replaced(pattern: dict[str, str], content: str, times: int = 1, kind: str = "normalizers") -> dict[str, Any]:
    step = {"type": "Replace", "pattern": pattern, "content": content}
    return {"type": "Sequence", kind: [step] * times}


def template(pieces: int, ids: int) -> dict[str, Any]:
    token = {"id": "<s>", "ids": [0] * ids, "tokens": ["<unk>"] * ids}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * pieces + [{"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"<s>": token}}


BOMBS = {
    "a normalizer that multiplies": (
        text(normalizer=replaced({"String": "1"}, "1" * 100, 5)),
        "its normalizer may make",
    ),
    "a pattern that matches nothing": (
        text(normalizer=replaced({"Regex": ""}, "a" * 10_000)),
        "its normalizer may make",
    ),
    "sequences in each other": (
        text(normalizer={"type": "Sequence", "normalizers": [replaced({"String": "1"}, "1" * 11)] * 2}),
        "its normalizer may make",
    ),
    "texts before the text": (
        text(normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 1_000_000}] * 8}),
        "its normalizer puts more than 1,024 characters",
    ),
    "a decoder that multiplies": (
        text(decoder=replaced({"String": "8"}, "8" * 100, 5, "decoders")),
        "its decoder may make",
    ),
    "a template of many tokens": (text(post_processor=template(2000, 1)), "its post_processor adds more than 1,024"),
    "a token of many ids": (text(post_processor=template(2, 1000)), "its post_processor adds more than 1,024"),
    "a long token": (text({**WORDS, "vocab": {"<unk>": 0, "a" * 100_000: 1}}), "a token of 100,000 characters"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_would_grow_out_of_proportion_is_refused_before_the_library_reads_it(bomb: str) -> None:
    given, says = BOMBS[bomb]
    with pytest.raises(ValueError, match=says):
        tokenizer_of(given)


def test_what_the_models_of_today_do_is_no_bomb() -> None:
    llama = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoder = replaced({"String": "▁"}, " ", 1, "decoders")
    made = tokenizer_of(
        text(
            normalizer={"type": "Sequence", "normalizers": [*llama, replaced({"Regex": "\\s+"}, " ")]},
            decoder=decoder,
            post_processor={"type": "Sequence", "processors": [template(2, 1)]},
        )
    )
    assert made.encode("a").ids[:2] == [0, 0]
