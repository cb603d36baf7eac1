"""Read untrusted tokenizer.json files: the tokenizers library panics on some, and aborts the process on others."""

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
    """Build a tokenizer from the text of its tokenizer.json, without truncation and padding, and try it once.

    Raises ValueError, in one sentence, for a file that cannot be used. Standard error is silenced meanwhile, because a
    panic in the library writes there even if it is caught.
    """
    _check_merges(parse_tokenizer(text).get("model"))
    with _ONE_AT_A_TIME, _silent():
        try:
            tokenizer = Tokenizer.from_str(text)
            # Both would silently change prompts: the runtime checks lengths and masks padding itself.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            with suppress(Exception):  # this text may have no tokens; prompts are checked when encoded
                tokenizer.encode("a")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's panics are BaseExceptions only
            raise ValueError(brief(error)) from error
    return tokenizer


def _check_merges(model: Any) -> None:
    """Raise ValueError for a merge of tokens outside the vocabulary, if a subword prefix is set.

    The library cuts the prefix off a merge's second token by its length in bytes, unchecked, and aborts the process if
    that splits a character.
    """
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
    """Redirect the process's standard error to the null device."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # standard error is closed
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
