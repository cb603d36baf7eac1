"""Prompts: text, or token ids as a list, a NumPy array or a tensor."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Number
from typing import Any, Protocol

import numpy as np

from ..errors import PromptError
from ..untrusted import brief

_NOT_IDS = (str, bytes, bytearray, memoryview, Mapping, Set)


class Array(Protocol):
    """A NumPy array or a tensor of token ids."""

    def tolist(self) -> Any:
        """Return the values as lists."""


Prompt = str | Sequence[int] | Array


def token_ids(prompt: Any) -> list[int]:
    """Return the token ids of a prompt that is not text. Raises PromptError for anything else."""
    return [_token_id(value) for value in _values(prompt)]


def separate(given: Any) -> tuple[list[Any], bool]:
    """Return the prompts given to ``generate``, and whether it was one: text, or one list of ids. Raises PromptError if
    none."""
    if isinstance(given, str):
        return [given], True
    values = _values(given)
    if not values:
        raise PromptError("there is no prompt")
    single = isinstance(values[0], Number | np.bool_) or getattr(values[0], "ndim", None) == 0
    return ([values], True) if single else (values, False)


def _values(given: Any) -> list[Any]:
    """Return the entries of a list, an array or a tensor."""
    to_list = None if isinstance(given, (*_NOT_IDS, type)) else getattr(given, "tolist", None)
    try:
        values = to_list() if callable(to_list) else given
    except Exception as error:  # for example a tensor without data
        raise PromptError(f"the token ids of the prompt cannot be read: {brief(error)}") from error
    if isinstance(values, (*_NOT_IDS, type)) or not isinstance(values, Iterable):
        hint = "; give its input_ids" if isinstance(given, Mapping) and "input_ids" in given else ""
        name = "None" if given is None else f"of type {type(given).__name__}"
        raise PromptError(f"a prompt must be text or a list of token ids, and this one is {name}{hint}")
    return list(values)


def _token_id(value: Any) -> int:
    if type(value) is int:
        return value
    plain = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    if isinstance(plain, bool) or not isinstance(plain, int):
        raise PromptError(
            f"a prompt must be text or a list of whole numbers (token ids), and this one holds {reprlib.repr(value)}"
        )
    return int(plain)
