"""The loss of sharing caches between the loops of a model that was trained with caches per loop, measured on text."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from melt_runtime.package.manifest import Manifest
from melt_runtime.progress import Step, no_progress

from ..checkpoint import Checkpoint
from ..reference.pytorch import reference_of
from .distances import agreement, log_softmax
from .expected import LARGE_BYTES
from .quality import LARGE_TOKENS, held_out, reference_logits, token_losses

_TOKENS = 256
# A large model's weights are read once per chunk and loop: fewer tokens where there are many loops, and narrow chunks.
_LARGE_LOOPS, _LEAST_TOKENS, _CHUNKS = 16, 48, 12


def _reading(manifest: Manifest) -> tuple[int, int]:
    """Return how many tokens are read, at most, and how many at a time.

    Within a chunk nothing is lost, so the text is read token by token, as answers are written. A large model's is
    shorter, and read in 12 chunks.
    """
    if manifest.weights_bytes <= LARGE_BYTES:
        return _TOKENS, 1
    tokens = max(_LEAST_TOKENS, min(LARGE_TOKENS, LARGE_TOKENS * _LARGE_LOOPS // manifest.loops))
    return tokens, min(tokens // _CHUNKS, manifest.chunk)


def sharing_loss(
    checkpoint: Checkpoint, directory: Path, manifest: Manifest, text: Path | None, progress: Step = no_progress
) -> dict[str, Any]:
    """Return the manifest's entry on shared caches: how far PyTorch with them is from PyTorch with caches per loop.

    ``checkpoint``: with shared caches. ``directory``: holds the tokenizer. ``text``: UTF-8; None: a built-in one, or
    random tokens where the vocabulary is too small for it, which have no perplexity. Raises ArgumentError.

    Within a chunk nothing is lost, because its tokens see each other's keys and values of the same loop. The entry says
    how many positions were read, and in which chunks (see ``_reading``).
    """
    tokens, chunk = _reading(manifest)
    held, read = held_out(directory, manifest, text, tokens), replace(manifest, chunk=chunk)
    progress("PyTorch: a cache per loop", 0, 0)
    expected = reference_logits(reference_of(checkpoint.as_trained().load()), held, manifest)
    progress("PyTorch: shared caches", 0, 0)
    found = reference_logits(reference_of(checkpoint.load()), held, read)
    kl, agree, losses = list[float](), list[bool](), (list[float](), list[float]())
    for ids, mine, theirs in zip(held.sequences, found, expected, strict=True):
        got, want = log_softmax(mine), log_softmax(theirs)
        rows, same = agreement(got, want)
        kl += rows
        agree += same
        for loss, logs in zip(losses, (got, want), strict=True):
            loss += token_losses(logs, ids)
    perplexity, per_loop = (math.exp(float(np.mean(loss))) if held.real else None for loss in losses)
    return {
        "how": "last",
        "text": held.text,
        "chunk": read.chunk,
        "positions": len(kl),
        "kl": max(float(np.mean(kl)), 0.0),
        "top1": float(np.mean(agree)),
        "perplexity": perplexity,
        "perplexity_per_loop": per_loop,
    }
