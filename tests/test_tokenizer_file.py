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
