"""The keyword options of ``generate``, ``stream`` and sessions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypedDict

import numpy as np

from ..errors import ArgumentError


class GenerateOptions(TypedDict, total=False):
    """The options of a request. LoopSettings explains loops to exit_same, SamplingParams temperature to logit_bias."""

    max_tokens: int  # 256
    loops: int | None  # None: the package's, or as many as ``exit`` "auto" was calibrated with
    exit_threshold: float | None  # None: the package's
    chunk: int | None  # None: the package's
    min_loops: int  # 1
    exit_change: float | None  # None, as for the next four: 0, or what ``exit`` says
    exit_kl: float | None
    exit_same: int | None
    exit_entropy: float | None
    exit_margin: float | None
    exit: str | None  # None; "NAME:VALUE" of exit_criteria, "never", or "auto": as calibrated at export
    exit_at_step: int | None  # None: the last of loops; counted from 0: end every token after this loop
    start_seed: int  # 0; of the noise that some models' loops start from
    start_state: str | None  # None: the model's own; "zeros" replaces its noise
    temperature: float  # 0
    top_k: int  # 0
    top_p: float  # 1
    min_p: float  # 0
    repetition_penalty: float  # 1
    seed: int | None  # None
    frequency_penalty: float  # 0
    presence_penalty: float  # 0
    logit_bias: Mapping[int, float] | None  # None; by token id
    stop: str | Iterable[str] | None  # stop before any of these strings
    stop_ids: int | Iterable[int] | None  # stop at any of these tokens, besides the model's own
    pipeline: str  # "auto": run several successive tokens at once where that is exact and faster; "on", "off"
    ignore_eos: bool  # False; True: do not stop at the model's own end tokens


# Other libraries' names for them.
_ALIASES = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "num_loops": "loops",
    "n_loops": "loops",
    "max_loops": "loops",
    "total_ut_steps": "loops",
    "num_steps": "loops",
    "depth": "loops",
    "early_exit_threshold": "exit_threshold",
    "early_exit_step": "exit_at_step",
    "exit_step": "exit_at_step",
    "initial_state": "start_state",
    "chunk_size": "chunk",
    "do_sample": "temperature",
    "typical_p": "top_p",
    "repeat_penalty": "repetition_penalty",
    "random_seed": "seed",
    "random_state": "seed",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "stop_words": "stop",
    "stop_token_ids": "stop_ids",
    "eos_token_id": "stop_ids",
    "eos_token_ids": "stop_ids",
}


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert options to plain Python values: NumPy scalars to numbers, iterators to lists.

    Raises ArgumentError for an unknown name, and suggests a known one.
    """
    names = GenerateOptions.__annotations__
    for name in options:
        if name not in names:
            near = get_close_matches(name, [*names, *_ALIASES], n=1)
            known = _ALIASES.get(name) or (_ALIASES.get(near[0], near[0]) if near else None)
            help = f"did you mean {known!r}?" if known else f"the options are {', '.join(names)}"
            raise ArgumentError(f"unknown option {name!r}; {help}")
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, Iterator) else value
