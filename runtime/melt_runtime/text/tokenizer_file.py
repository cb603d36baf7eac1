"""tokenizer.json from anyone: the tokenizers library panics over some files, and ends the process over others."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tokenizers import Tokenizer

from ..untrusted import brief
from .tokenizer_limits import parse_tokenizer

_ONE_AT_A_TIME = threading.Lock()


def tokenizer_of(text: str) -> Tokenizer:
    """A tokenizer from the text of its tokenizer.json, without truncation and padding, that has been tried once.

    Raises ValueError that says what is wrong with it.

    While the library reads, nothing reaches the process's standard error: a panic writes there, whoever catches it.
    """
    _check_merges(parse_tokenizer(text).get("model"))
    with _ONE_AT_A_TIME, _silent():
        try:
            tokenizer = Tokenizer.from_str(text)
            # Both would silently change prompts: the runtime checks lengths itself and pads with its own mask.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            with suppress(Exception):  # a text that cannot be written is the text's matter
                tokenizer.encode("a")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the library is no Exception
            raise ValueError(brief(error)) from error
    return tokenizer


def _check_merges(model: Any) -> None:
    """Raises ValueError for a merge whose tokens are not in the vocabulary, where a prefix is set. The library cuts the
    prefix off a merge's second token by its length in bytes, whatever it begins with, and ends the process over half a
    character."""
    if not isinstance(model, dict) or not model.get("merges") or not model.get("continuing_subword_prefix"):
        return
    vocab, merges, prefix = model.get("vocab"), model["merges"], model["continuing_subword_prefix"]
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(prefix, str):
        raise ValueError("the model's vocabulary, merges or prefix are of a wrong type")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"the merge {str(merge)[:80]!r} is no pair of tokens")
        first, second = pair
        merged = first + second.removeprefix(prefix)
        if not second.startswith(prefix) or not {first, second, merged} <= vocab.keys():
            raise ValueError(f"the merge of {first[:40]!r} and {second[:40]!r} is of tokens that the vocabulary lacks")


@contextmanager
def _silent() -> Iterator[None]:
    """Leads the process's standard error nowhere."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
