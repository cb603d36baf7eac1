"""Time greedy decoding from a prompt, with successive tokens pipelined or not."""

from __future__ import annotations

from itertools import cycle, islice
from time import perf_counter
from typing import NamedTuple

import numpy as np

from ..decoding.loop_driver import LoopDriver
from ..decoding.pipeline import Pipelining
from ..decoding.settings import GenerationOptions, LoopSettings
from ..runtime import Runtime


class Decoded(NamedTuple):
    """``token``: mean seconds per token. ``runs``: runs of the loop step per token, for a plain one as many as
    loops."""

    token: float
    runs: float


def prompt_ids(runtime: Runtime, count: int) -> list[int]:
    """Return ``count`` tokens: the package's example prompt over and over, or random ones if it has none."""
    text = runtime.example_prompt
    found = [] if text is None or runtime.tokenizer is None else runtime.encode(text)
    if not found:
        found = np.random.default_rng(0).integers(0, runtime.manifest.vocab_size, count).tolist()
    return list(islice(cycle(found), count))


def decode(driver: LoopDriver, prompt: list[int], loops: int, tokens: int, pipeline: str) -> Decoded:
    """Run a prompt, then decode ``tokens`` tokens after one that is not timed.

    ``pipeline``: as in ``GenerationOptions``. Raises ArgumentError if it is "on" and cannot be.
    """
    settings = LoopSettings(loops)
    counts = driver.begin_pipeline(GenerationOptions(settings, pipeline=pipeline))
    pipelining = None if counts is None else Pipelining(lambda logits, _: int(logits.argmax()), pipeline == "on")
    driver.reset()
    if len(prompt) > 1:
        driver.append([prompt[:-1]], settings)

    def decode_next(token: int) -> int:
        return int(driver.advance([[token]], settings, pipelining=pipelining).row(0).argmax())

    token = decode_next(prompt[-1])
    runs, piped = (0, 0) if counts is None else (counts.runs, counts.tokens)
    started = perf_counter()
    for _ in range(tokens):
        token = decode_next(token)
    seconds = perf_counter() - started
    if counts is not None:
        runs, piped = counts.runs - runs, counts.tokens - piped
    return Decoded(seconds / tokens, (runs + loops * (tokens - piped)) / tokens)
