"""Sensitivity of each weight to 4 bits, measured on a text, to choose those that get 8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from melt_runtime.progress import Step, no_progress
from torch import Tensor, nn

from ..reference.float32_matmul import Float32Matmul
from ..reference.pytorch import every_loop, linear_layers
from .blocks import rounding_error
from .options import Grid

_TOKENS = 64  # per sequence: the memory for gradients grows with them
_SHARE = 4  # uses one of so many calibration sequences


def sensitivities(
    model: nn.Module, sequences: list[list[int]], loops: int, chunk: int, grid: Grid, progress: Step = no_progress
) -> dict[str, float]:
    """Estimate the loss of storing each weight in 4 bits, in nats per token, by its checkpoint name.

    The estimate serves to compare weights: half of the squared gradient of a text's loss along errors of the size that
    rounding makes, in random directions, over all tokens and loops. The model's parameters must not require gradients.
    """
    layers = linear_layers(model)
    found = dict.fromkeys(layers, 0.0)
    handles = [module.register_forward_hook(_watch(name, found)) for name, module in layers.items()]
    chosen = [ids[:_TOKENS] for ids in sequences[::_SHARE] if len(ids) > 1]
    for ids in chosen:
        _text_loss(model, ids, loops, chunk).backward()  # type: ignore[no-untyped-call]
        progress("which weights need more bits", len(chosen), 1)
    for handle in handles:
        handle.remove()
    tokens = max(1, sum(map(len, chosen)))
    errors = {name: rounding_error(module.weight, grid) for name, module in layers.items()}
    return {name: found[name] * errors[name] / (2 * tokens) for name in found}


def most_sensitive(sizes: Mapping[str, int], costs: Mapping[str, float], budget: float) -> set[str]:
    """Choose names to fit into ``budget`` bytes, sorted by cost per byte, highest first."""
    chosen, left = set(), budget
    for name in sorted(sizes, key=lambda name: costs[name] / sizes[name], reverse=True):
        if sizes[name] <= left:
            chosen.add(name)
            left -= sizes[name]
    return chosen


def _watch(name: str, found: dict[str, float]) -> Callable[..., None]:
    """Return a hook that adds up, over tokens, |input|^2 |gradient of the output|^2 of a matmul."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        lengths = inputs[0].detach().float().square().sum(-1)

        def add(gradient: Tensor) -> None:
            found[name] += float((gradient.float().square().sum(-1) * lengths).sum())

        output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook


def _text_loss(model: nn.Module, ids: list[int], loops: int, chunk: int) -> Tensor:
    """Return the summed cross-entropy of a sequence's tokens, in nats. Gradients flow back to the embedding."""
    tokens = torch.tensor([ids])
    embedded = model.get_submodule("model.embed_tokens")(tokens).float().requires_grad_()
    with Float32Matmul():
        logits = model(inputs_embeds=embedded, **every_loop(model, loops, chunk)).logits[0, :-1]
    return F.cross_entropy(logits.float(), tokens[0, 1:], reduction="sum")
