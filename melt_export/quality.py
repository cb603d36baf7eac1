"""What quantization costs: a package's logits beside its checkpoint's in float32, on held-out text.

Parity proves that a package computes what its stored numbers say; this says how far those numbers are from the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from melt_runtime import ArgumentError, LoopSettings, Runtime
from melt_runtime.package import Manifest
from melt_runtime.progress import Step, no_progress
from melt_runtime.text import TextCodec
from numpy.typing import NDArray

from .parity import Limits, Quality, log_softmax
from .reference import Reference

TOKENS = 768  # at most, by default
_LARGE_TOKENS = 96  # of a model whose tokens take PyTorch seconds each
_SEQUENCE = 256
# By how weights are stored: the mean KL divergence, in nats, at which melt-verify calls a package spoilt.
MOST_KL = {"int8": 0.01, "int4": 0.5}


@dataclass(frozen=True)
class HeldOut:
    """Sequences of token ids to measure on, and what they are. ``real``: text, not random tokens."""

    sequences: list[list[int]]
    text: str
    real: bool


def held_out(package: Path, manifest: Manifest, path: Path | None, tokens: int | None, large: bool) -> HeldOut:
    """The text at ``path`` (UTF-8), or a built-in one; random tokens where the vocabulary cannot write the latter.

    tokens: how many at most. Raises ArgumentError for a text that cannot be used.
    """
    count = tokens or (_LARGE_TOKENS if large else TOKENS)
    room = min(_SEQUENCE, manifest.max_seq_len)
    codec = TextCodec.load(package) if (package / "tokenizer.json").is_file() else None
    if path is not None:
        if codec is None:
            raise ArgumentError("--eval-text needs a tokenizer, and the checkpoint has none")
        try:
            ids = codec.encode(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"--eval-text {path} cannot be read: {error}") from error
        name = path.name
    else:
        text = files(__package__).joinpath("held_out.txt").read_text(encoding="utf-8")
        ids, name = _encoded(codec, text), "the built-in text"
    real = len(ids) > 1
    if not real and path is not None:
        raise ArgumentError(f"--eval-text {path} has fewer than two tokens")
    if not real:
        rng = np.random.default_rng(1)
        ids, name = rng.integers(0, manifest.vocab_size, min(count, 4 * room)).tolist(), "random tokens"
    sequences = [ids[at : at + room] for at in range(0, min(len(ids), count), room)]
    return HeldOut([ids for ids in sequences if len(ids) > 1] or [ids[:room]], name, real)


def _encoded(codec: TextCodec | None, text: str) -> list[int]:
    """Nothing where the vocabulary has no word for most of it."""
    if codec is None or codec.vocab_size < 1000:
        return []
    return codec.encode(text)


def reference_logits(reference: Reference, held: HeldOut, manifest: Manifest) -> list[NDArray[np.float32]]:
    """The checkpoint's logits (tokens, vocab) of each sequence, in the package's chunks."""
    return [reference.logits(ids, manifest.loops, manifest.chunk) for ids in held.sequences]


def measure(
    runtime: Runtime,
    held: HeldOut,
    expected: list[NDArray[np.float32]],
    loops: int,
    limits: Limits,
    progress: Step = no_progress,
) -> Quality:
    """Runs the package over the sequences and compares."""
    driver, settings = runtime.driver(), LoopSettings(loops)
    divergence: list[float] = []
    agree: list[bool] = []
    losses: tuple[list[float], list[float]] = ([], [])
    for ids, theirs in zip(held.sequences, expected, strict=True):
        driver.reset()
        rows = []
        for chunk in driver.chunks([ids]):
            for _ in driver.loops(chunk, settings):
                pass
            rows.append(driver.state.logits(np.arange(int(chunk.counts[0]))[None])[0].copy())
        got, want = log_softmax(np.concatenate(rows)), log_softmax(theirs)
        divergence += (np.exp(want) * (want - got)).sum(-1).tolist()
        agree += (got.argmax(-1) == want.argmax(-1)).tolist()
        following = np.asarray(ids[1:])[:, None]
        for loss, logs in zip(losses, (got, want), strict=True):
            loss += (-np.take_along_axis(logs[:-1], following, -1)[:, 0]).tolist()
        progress("package: held-out text", len(held.sequences), 1)
    mine, reference = (math.exp(float(np.mean(loss))) if held.real else None for loss in losses)
    kl, top1 = float(np.mean(divergence)), float(np.mean(agree))
    return Quality(held.text, len(divergence), kl, top1, mine, reference, limits)
