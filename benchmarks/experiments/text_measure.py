"""Perplexity of a LoopLM or MELT on held-out text: by loops, by chunk size, by source, and decoding token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from melt_models import LoopLMForCausalLM
from melt_models.training.evaluate import Model
from torch import Tensor

Figures: TypeAlias = dict[str, Any]
LOOPS = tuple(range(1, 9))


def held_out_sequences(files: list[str], length: int, most: int) -> dict[str, Tensor]:
    """Return up to ``most`` sequences per source, evenly spread over its held-out tokens: (n, length + 1) int64."""
    found = {}
    for file in files:
        tokens = np.fromfile(file, dtype=np.uint16).astype(np.int64)
        count = min(most, (len(tokens) - 1) // length)
        starts = np.linspace(0, len(tokens) - length - 1, max(count, 0)).astype(int)
        if count > 0:
            name = Path(file).name.removesuffix("-held-out.bin")
            found[name] = torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]))
    return found


@torch.no_grad()
def loss(model: Model, sequences: Tensor, batch: int, *, decoded: int = 0, **settings: Any) -> Tensor:
    """Return the cross-entropy of each sequence's last ``decoded`` tokens (0: all) in nats, (sequences,).

    The last ``decoded`` tokens are run one at a time after the others; 0: the whole sequence at once.
    """
    losses = []
    for at in range(0, len(sequences), batch):
        ids = sequences[at : at + batch].to(model.device)
        ids, targets = ids[:, :-1], ids[:, 1:]
        split = ids.shape[1] - decoded
        output = model(ids[:, :split], use_cache=bool(decoded), **settings)
        logits = output.logits
        if decoded:
            steps = []
            for column in range(split, ids.shape[1]):
                output = model(ids[:, column : column + 1], past_key_values=output.past_key_values, **settings)
                steps.append(output.logits)
            logits, targets = torch.cat(steps, dim=1), targets[:, split:]
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(nats.view(targets.shape).mean(1).cpu())
    return torch.cat(losses)


def perplexity(model: Model, held_out: dict[str, Tensor], batch: int, **settings: Any) -> Figures:
    """Return the perplexity over all sequences and of each source."""
    losses = loss(model, torch.cat(list(held_out.values())), batch, **settings)
    sizes = [len(sequences) for sequences in held_out.values()]
    by_source = zip(held_out, losses.split(sizes), strict=True)
    return {"all": _exp(losses), "sources": {name: _exp(one) for name, one in by_source}}


def _exp(losses: Tensor) -> float:
    return round(math.exp(float(losses.double().mean())), 3)


def at_loops(model: Model, loops: int) -> Figures:
    """Return the forward's settings for a number of loops, all of which run."""
    if isinstance(model, LoopLMForCausalLM):
        return {"num_loops": loops, "exit_at_step": loops - 1}
    return {"num_loops": loops, "exit_threshold": 1.0}


def measure(
    model: Model,
    held_out: dict[str, Tensor],
    depths: Sequence[int],
    chunks: Sequence[int],
    batch: int,
    *,
    decoded: int,
) -> Figures:
    """Measure a model at each of ``depths``; a MELT also in each of the sizes ``chunks``, and at every depth with
    the last ``decoded`` tokens of each sequence decoded token by token (0: not)."""
    depth = model.config.total_ut_steps
    found: Figures = {
        "loops": {str(loops): perplexity(model, held_out, batch, **at_loops(model, loops)) for loops in depths}
    }
    if isinstance(model, LoopLMForCausalLM):
        return found
    settings = at_loops(model, depth)
    found["chunks"] = {str(size): perplexity(model, held_out, batch, chunk_size=size, **settings) for size in chunks}
    if decoded:
        everything = torch.cat(list(held_out.values()))
        found["decoded"] = {}
        for loops in range(1, depth + 1):
            settings = at_loops(model, loops)
            # The same tokens read in chunks: the loss of the last tokens only.
            found["decoded"][str(loops)] = {
                "token by token": _exp(loss(model, everything, batch, decoded=decoded, **settings)),
                "in chunks": _exp(_last_tokens(model, everything, batch, decoded, settings)),
            }
    return found


@torch.no_grad()
def _last_tokens(model: Model, sequences: Tensor, batch: int, count: int, settings: Figures) -> Tensor:
    """Return the cross-entropy of the last ``count`` tokens of each sequence, read in chunks."""
    losses = []
    for at in range(0, len(sequences), batch):
        ids = sequences[at : at + batch].to(model.device)
        logits = model(ids[:, :-1], use_cache=False, **settings).logits[:, -count:].float()
        targets = ids[:, -count:]
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(nats.view(targets.shape).mean(1).cpu())
    return torch.cat(losses)
