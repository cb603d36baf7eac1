"""The loss of sharing caches between the loops of a model that was trained with caches per loop, measured on text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from melt_runtime.package.manifest import Manifest
from melt_runtime.progress import Step, no_progress

from ..checkpoint import Checkpoint
from ..reference.pytorch import reference_of
from .distances import agreement, log_softmax
from .expected import LARGE_BYTES
from .quality import LARGE_TOKENS, TOKENS, held_out, reference_logits, token_losses


def sharing_loss(
    checkpoint: Checkpoint, directory: Path, manifest: Manifest, text: Path | None, progress: Step = no_progress
) -> dict[str, Any]:
    """Return the manifest's entry on shared caches: how far PyTorch with them is from PyTorch with caches per loop.

    ``checkpoint``: with shared caches. ``directory``: holds the tokenizer. ``text``: UTF-8; None: a built-in one, or
    random tokens where the vocabulary is too small for it, which have no perplexity. Raises ArgumentError.
    """
    held = held_out(directory, manifest, text, LARGE_TOKENS if manifest.weights_bytes > LARGE_BYTES else TOKENS)
    progress("PyTorch: a cache per loop", 0, 0)
    expected = reference_logits(reference_of(checkpoint.as_trained().load()), held, manifest)
    progress("PyTorch: shared caches", 0, 0)
    found = reference_logits(reference_of(checkpoint.load()), held, manifest)
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
        "positions": len(kl),
        "kl": max(float(np.mean(kl)), 0.0),
        "top1": float(np.mean(agree)),
        "perplexity": perplexity,
        "perplexity_per_loop": per_loop,
    }
