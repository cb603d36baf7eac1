"""Quality of a model: exact match by greedy decoding at any depth, and perplexity on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..looplm import LoopLMForCausalLM
from ..melt import MeltForCausalLM
from .data import IGNORE, Batches
from .tasks import END, Example

Model: TypeAlias = LoopLMForCausalLM | MeltForCausalLM


class Score(NamedTuple):
    """``accuracy``: share of exact answers, 0 to 1; ``loops``: mean number of loops per written token."""

    accuracy: float
    loops: float


@torch.no_grad()
def exact_match(
    model: Model,
    examples: Sequence[Example],
    vocabulary: Sequence[str],
    *,
    num_loops: int | None = None,
    exit_threshold: float = 1.0,
    chunk_size: int | None = None,
    batch: int = 500,
) -> Score:
    """Decode greedily with a cache, one token at a time, and count the answers that match exactly, END included.

    ``vocabulary`` is the task's. ``num_loops`` (default: as trained) may be more or fewer; for a LoopLM it is the loop
    that the head reads. ``chunk_size`` is the prompt's, for MELT only. Raises ValueError if the prompts, or the
    answers, differ in length.
    """
    ids = {token: index for index, token in enumerate(vocabulary)}
    if len({(len(x.prompt), len(x.answer)) for x in examples}) != 1:
        raise ValueError("exact match needs examples, with prompts of one length and answers of one length")
    settings = _settings(model, num_loops, exit_threshold, chunk_size)
    right, loops, written = 0, 0, 0
    for at in range(0, len(examples), batch):
        part = examples[at : at + batch]
        prompts = torch.tensor([[ids[c] for c in x.prompt] for x in part], device=model.device)
        answers = torch.tensor([[*(ids[c] for c in x.answer), ids[END]] for x in part], device=model.device)
        tokens, depth = greedy(model, prompts, answers.shape[1], settings)
        right += int((tokens == answers).all(1).sum())
        loops, written = loops + int(depth.sum()), written + depth.numel()
    return Score(right / len(examples), loops / written)


@torch.no_grad()
def greedy(model: Model, prompts: Tensor, count: int, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Decode ``count`` tokens after prompts (batch, n).

    Returns the tokens and the loops of each, both (batch, count).
    """
    step, cache, tokens, depths = prompts, None, [], []
    for _ in range(count):
        output = model(step, past_key_values=cache, logits_to_keep=1, **settings)
        step, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        tokens.append(step)
        depths.append(output.depth[:, -1:])
    return torch.cat(tokens, 1), torch.cat(depths, 1)


@torch.no_grad()
def perplexity(
    model: Model,
    batches: Batches,
    sequences: int,
    *,
    num_loops: int | None = None,
    chunk_size: int | None = None,
    batch: int = 8,
) -> float:
    """Return exp of the mean cross-entropy per target, over the next ``sequences`` of a held-out stream.

    The stream is reset afterwards, so that the next call measures the same sequences.
    """
    before, total, labelled = batches.state_dict(), 0.0, 0
    try:
        for at in range(0, sequences, batch):
            input_ids, targets = batches.take(min(batch, sequences - at), 1.0)
            loss, count = cross_entropy(model, input_ids, targets, num_loops, chunk_size)
            total, labelled = total + loss, labelled + count
    finally:
        batches.load_state_dict(before)
    if not labelled:
        raise ValueError(f"perplexity of {sequences} sequences is not defined; ask for 1 or more")
    return float(torch.tensor(total / labelled, dtype=torch.float64).exp())


@torch.no_grad()
def cross_entropy(
    model: Model, input_ids: Tensor, targets: Tensor, num_loops: int | None = None, chunk_size: int | None = None
) -> tuple[float, int]:
    """Return the sum of the cross-entropies over the targets other than IGNORE, and the number of those.

    input_ids, targets: (batch, n), on any device.
    """
    input_ids, targets = input_ids.to(model.device), targets.to(model.device)
    logits = model(input_ids, use_cache=False, **_settings(model, num_loops, 1.0, chunk_size)).logits
    labelled = targets != IGNORE
    loss = F.cross_entropy(logits[labelled].float(), targets[labelled], reduction="none")
    return loss.sum(dtype=torch.float64).item(), int(labelled.sum())


def _settings(model: Model, num_loops: int | None, exit_threshold: float, chunk_size: int | None) -> dict[str, Any]:
    """Return the keyword arguments of the model's forward. Raises ValueError for a depth that the model cannot have."""
    num_loops = model.config.total_ut_steps if num_loops is None else num_loops
    settings: dict[str, Any] = {"num_loops": num_loops, "exit_threshold": exit_threshold}
    if isinstance(model, MeltForCausalLM):
        return settings | {"chunk_size": chunk_size}
    if exit_threshold >= 1.0:  # read the last of these loops, whatever the config says
        return settings | {"exit_at_step": num_loops - 1}
    if model.config.early_exit_step is not None:
        raise ValueError(f"early_exit_step is {model.config.early_exit_step} in the config; no threshold is read then")
    return settings
