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
_LARGE_CHUNK = 8  # PyTorch widens a large model's weights for every chunk and loop


def sharing_loss(
    checkpoint: Checkpoint, directory: Path, manifest: Manifest, text: Path | None, progress: Step = no_progress
) -> dict[str, Any]:
    """Return the manifest's entry on shared caches: how far PyTorch with them is from PyTorch with caches per loop.

    ``checkpoint``: with shared caches. ``directory``: holds the tokenizer. ``text``: UTF-8; None: a built-in one, or
    random tokens where the vocabulary is too small for it, which have no perplexity. Raises ArgumentError.

    Within a chunk nothing is lost, because its tokens see each other's keys and values of the same loop. So the text is
    read token by token, as answers are written, or a large model's in narrow chunks.
    """
    large = manifest.weights_bytes > LARGE_BYTES
    held = held_out(directory, manifest, text, LARGE_TOKENS if large else _TOKENS)
    read = replace(manifest, chunk=min(_LARGE_CHUNK, manifest.chunk) if large else 1)
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
