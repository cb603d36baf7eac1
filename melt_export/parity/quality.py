"""Loss of quality by quantization: a package's logits against its checkpoint's in float32, on held-out text.

Parity proves that a package computes correctly with its stored values; quality measures how far these are from the
model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np
from melt_runtime import ArgumentError, LoopDriver, LoopSettings, Runtime
from melt_runtime.package.manifest import Manifest
from melt_runtime.package.reader import Package
from melt_runtime.progress import Step, no_progress
from numpy.typing import NDArray

from ..reference.pytorch import Reference
from ..reference.texts import encode_text
from .distances import agreement, log_softmax
from .exact_match import Problem, checkpoint_accuracy, package_accuracy
from .report import Accuracy, Limits, Quality

TOKENS = 768  # most tokens that a package is measured on
LARGE_TOKENS = 96  # for a model that takes PyTorch seconds per token
_SEQUENCE = 256
# Largest mean KL divergence in nats, by type of weights or caches, beyond which melt-verify fails.
_MOST_KL = {"int8": 0.01, "int4": 0.5}


def limits_of(manifest: Manifest, kl: float | None = None, perplexity: float | None = None) -> Limits:
    """Return a package's limits. ``kl`` None: the default of its narrowest type; ``perplexity`` None: no limit."""
    usual = [_MOST_KL[part["kind"]] for part in (manifest.weights, manifest.cache) if part]
    return Limits(max(usual, default=None) if kl is None else kl, perplexity)


@dataclass(frozen=True)
class HeldOut:
    """Sequences of token ids to measure on, and their description. ``real``: text rather than random tokens."""

    sequences: list[list[int]]
    text: str
    real: bool


def held_out(package: Path, manifest: Manifest, path: Path | None, tokens: int) -> HeldOut:
    """Read the text at ``path`` (UTF-8), or a built-in one; random tokens if the vocabulary is too small for the
    latter.

    ``tokens``: the largest number of tokens. Raises ArgumentError for a text that cannot be used.
    """
    room = min(_SEQUENCE, manifest.max_seq_len)
    ids = encode_text(package, path, _built_in, option="--eval-text", refused=ArgumentError)
    if ids is None:
        rng = np.random.default_rng(1)
        ids = rng.integers(0, manifest.vocab_size, min(tokens, 4 * room)).tolist()
        name, real = "random tokens", False
    else:
        name, real = "the built-in text" if path is None else path.name, True
    sequences = [ids[at : at + room] for at in range(0, min(len(ids), tokens), room)]
    return HeldOut([ids for ids in sequences if len(ids) > 1] or [ids[:room]], name, real)


@dataclass
class QualityCheck:
    """Held-out text and problems to measure a quantized package on, and the checkpoint's results.

    ``logits``: the checkpoint's, per sequence of ``held``; ``right``: the share of ``problems`` that it answers.
    """

    held: HeldOut
    problems: list[Problem]
    limits: Limits
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    right: float = 0.0

    def take_reference(self, reference: Reference, package: Package, manifest: Manifest, progress: Step) -> None:
        """Run the checkpoint on the text and the problems."""
        progress("PyTorch: held-out text", 0, 0)
        self.logits = reference_logits(reference, self.held, manifest)
        if self.problems:
            self.right = checkpoint_accuracy(reference, package, self.problems, progress)

    def measure(self, runtime: Runtime, loops: int, progress: Step) -> Quality:
        """Run a package over the held-out text and compare its logits."""
        return measure(runtime, self.held, self.logits, loops, self.limits, progress)

    def accuracy(self, runtime: Runtime, progress: Step) -> Accuracy | None:
        """Count a package's exact answers; None without problems."""
        if not self.problems:
            return None
        return Accuracy(len(self.problems), package_accuracy(runtime, self.problems, progress), self.right)


def _built_in() -> str:
    return files(__package__).joinpath("held_out.txt").read_text(encoding="utf-8")


def reference_logits(reference: Reference, held: HeldOut, manifest: Manifest) -> list[NDArray[np.float32]]:
    """Return the checkpoint's logits (tokens, vocab) of each sequence, in the package's chunks."""
    return [reference.logits(ids, manifest.loops, manifest.chunk) for ids in held.sequences]


def text_logits(driver: LoopDriver, ids: Sequence[int], settings: LoopSettings) -> NDArray[np.float32]:
    """Return a package's logits (tokens, vocab) of a sequence of its own, in the chunks of ``settings``."""
    driver.reset()
    rows = []
    for chunk in driver.chunks([ids], settings.chunk):
        for _ in driver.loops(chunk, settings):
            pass
        rows.append(driver.state.logits(np.arange(int(chunk.counts[0]))[None])[0].copy())
    return np.concatenate(rows)


def token_losses(logs: NDArray[np.float64], ids: list[int]) -> list[float]:
    """Return the loss of every token after the first, in nats, from log-probabilities (tokens, vocab)."""
    following = np.asarray(ids[1:])[:, None]
    return (-np.take_along_axis(logs[:-1], following, -1)[:, 0]).tolist()  # type: ignore[no-any-return]


def measure(
    runtime: Runtime,
    held: HeldOut,
    expected: list[NDArray[np.float32]],
    loops: int,
    limits: Limits,
    progress: Step = no_progress,
) -> Quality:
    """Run the package over the sequences and compare its logits."""
    driver, settings = runtime.driver(), LoopSettings(loops)
    return compare(lambda ids: text_logits(driver, ids, settings), held, expected, limits, progress)


def compare(
    logits: Callable[[list[int]], NDArray[np.float32]],
    held: HeldOut,
    expected: list[NDArray[np.float32]],
    limits: Limits,
    progress: Step = no_progress,
) -> Quality:
    """Compare logits, which are computed from the ids of each sequence as (tokens, vocab), with the checkpoint's."""
    divergence: list[float] = []
    agree: list[bool] = []
    losses: tuple[list[float], list[float]] = ([], [])
    for ids, theirs in zip(held.sequences, expected, strict=True):
        got, want = log_softmax(logits(ids)), log_softmax(theirs)
        rows_kl, same = agreement(got, want)
        divergence += rows_kl
        agree += same
        for loss, logs in zip(losses, (got, want), strict=True):
            loss += token_losses(logs, ids)
        progress("package: held-out text", len(held.sequences), 1)
    mine, reference = (math.exp(float(np.mean(loss))) if held.real else None for loss in losses)
    kl, top1 = float(np.mean(divergence)), float(np.mean(agree))
    return Quality(held.text, len(divergence), kl, top1, mine, reference, limits)
