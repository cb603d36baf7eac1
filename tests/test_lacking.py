"""A character that a tokenizer has no token for is named, in one line; it is never left out without a word."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from conftest import MakePackage
from melt_runtime import PromptError, Runtime
from melt_runtime.text.tokenizer import TextTokenizer
from serving import WAIT, Server
from test_run_cli import refused, run
from test_text import byte_fallback, byte_level, characters, metaspace, word_pieces, words
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

EXAMPLES = Path(__file__).parent.parent / "examples"
PROBLEM = "4829173+3917458="


@pytest.fixture(scope="module")
def addition(make_package: MakePackage) -> Path:
    return make_package(EXAMPLES / "addition-melt", max_batch=32)


def split() -> Tokenizer:
    """Every character a token, and none for others, as in the shipped demo."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "1": 1, "2": 2, "+": 3}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<pad>"])
    return tokenizer


def bare_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def short_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def lowered() -> Tokenizer:
    tokenizer = bare_bpe()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)]))
    return tokenizer


def whole_words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "text", "what"),
    [
        (split, "1 + 2", "the character ' ' at character 1"),
        (split, "<pad>12\x1b", r"the character '\x1b' at character 7"),
        (bare_bpe, "ab acb", "the character 'c' at character 4"),
        (bare_bpe, "é", "the character 'é' at character 0"),
        (short_byte_level, "a b!", "the character '!' at character 3"),
        (lowered, "AB C", "the character 'c'"),
        (unigram, "abc", "the character 'c' at character 2"),
        (whole_words, "one three two", "the word 'three' at character 4"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_the_tokenizer_lacks_is_named(make: object, text: str, what: str) -> None:
    ours = TextTokenizer(make())  # type: ignore[operator]
    with pytest.raises(PromptError) as caught:
        ours.encode(text)
    assert str(caught.value) == f"The tokenizer has no token for {what}, and none for unknown ones."


@pytest.mark.parametrize(
    "make", [byte_level, byte_fallback, metaspace, characters, words, word_pieces], ids=lambda make: make.__name__
)
def test_a_tokenizer_that_knows_unknown_ones_takes_any_text(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    for text in ("Hello, wörld! 😀\x00", "", " ", "ẞ\u0301"):
        assert TextTokenizer(tokenizer).encode(text) == tokenizer.encode(text).ids


def test_known_text_is_taken_by_those_that_lack_others() -> None:
    for make, text in ((split, "<pad>1+2"), (bare_bpe, " ab  ba "), (lowered, "AbA"), (short_byte_level, "a b")):
        tokenizer = make()
        assert TextTokenizer(tokenizer).encode(text) == tokenizer.encode(text).ids


def test_the_demo_says_it_in_one_line_everywhere(addition: Path) -> None:
    sentence = "The tokenizer has no token for the character ' ' at character 2, and none for unknown ones."
    assert refused(run("generate", addition, "12 + 13 =")) == f"melt-run: {sentence}"
    with pytest.raises(PromptError, match="the character ' '"):
        Runtime.load(addition).generate("12 + 13 =")
    with Server(addition) as server:
        body = {"model": "tiny", "prompt": "12 + 13 ="}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=WAIT)
        assert (reply.status_code, reply.json()["error"]["message"]) == (400, sentence)
        assert httpx.get(f"{server.url}/v1/models", timeout=WAIT).json()["data"][0]["example_prompt"] == PROBLEM


def test_the_demo_carries_a_prompt_that_it_can_answer(addition: Path) -> None:
    runtime = Runtime.load(addition)
    assert runtime.example_prompt == PROBLEM
    assert runtime.generate(PROBLEM).text == "8746631"
    assert json.loads(run("inspect", addition, "--json").stdout)["example_prompt"] == PROBLEM
    assert PROBLEM in run("inspect", addition).stdout


def test_a_package_without_an_example_says_nothing_of_one(tiny_package: Path) -> None:
    assert Runtime.load(tiny_package).example_prompt is None
    assert "for example" not in run("inspect", tiny_package).stdout
