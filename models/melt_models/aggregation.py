"""Ways to combine a token's inputs over the loops into the latent from which its keys and values are projected.

The learned element-wise gate is MELT's (arXiv 2605.07721); the others are the alternatives of its ablation. Each works
on a_t, a layer's normed input in loop t, and keeps one latent per token and layer from loop to loop.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration import MeltConfig

# An untrained gate: z = 0.12, so that keys and values stay close to those that a LoopLM's weights were trained for.
GATE_BIAS_INIT = -2.0


class Aggregation(nn.Module):
    """Base class, and the simplest aggregation: ``h_t = a_t``, so that only the last loop counts."""

    def start(self, a: Tensor) -> Tensor:
        """Return the latent before the first loop, (batch, chunk, latent_size)."""
        return a

    def forward(self, a: Tensor, latent: Tensor) -> Tensor:
        """Return the new latent. a: (batch, chunk, d); latent: (batch, chunk, latent_size), kept."""
        return a

    def read(self, latent: Tensor) -> Tensor:
        """Return h_t, the input of the key and value projections: (batch, chunk, latent_size) -> (batch, chunk, d)."""
        return latent

    def first(self, a: Tensor) -> Tensor:
        """Return h_1, equal to ``read`` after the first loop, without computing a gate that would leave it equal to
        ``a``."""
        return a


class LatentGate(Aggregation):
    """MELT's gate: ``h_t = z_t h_{t-1} + (1 - z_t) a_t`` with ``z_t = sigmoid(a_t W_z + h_{t-1} U_z + b_z)``.

    The element-wise gate has 2 d^2 + d parameters per layer. With ``width`` 1 the gate is one scalar per token and has
    2 d + 1 parameters.
    """

    def __init__(self, size: int, width: int | None = None, *, from_input: bool = True):
        super().__init__()
        width = size if width is None else width
        self.from_input = from_input
        self.input_proj = nn.Linear(size, width, bias=False)  # W_z
        self.latent_proj = nn.Linear(size, width, bias=False)  # U_z
        self.bias = nn.Parameter(torch.full((width,), GATE_BIAS_INIT))  # b_z

    def start(self, a: Tensor) -> Tensor:
        return a if self.from_input else torch.zeros_like(a)

    def forward(self, a: Tensor, latent: Tensor) -> Tensor:
        z = torch.sigmoid(self.input_proj(a) + self.latent_proj(latent) + self.bias)
        return a + z * (latent - a)  # z h + (1 - z) a, and exactly a where h is a

    def first(self, a: Tensor) -> Tensor:
        return a if self.from_input else self(a, self.start(a))


class MovingAverage(Aggregation):
    """Exponential moving average with a fixed weight w: ``h_t = w a_t + (1 - w) h_{t-1}``."""

    def __init__(self, weight: float, *, from_input: bool = True):
        super().__init__()
        self.weight, self.from_input = weight, from_input

    def start(self, a: Tensor) -> Tensor:
        return a if self.from_input else torch.zeros_like(a)

    def forward(self, a: Tensor, latent: Tensor) -> Tensor:
        return latent + self.weight * (a - latent)

    def first(self, a: Tensor) -> Tensor:
        return a if self.from_input else self(a, self.start(a))


class Mean(Aggregation):
    """Mean over the loops: ``h_t = (a_1 + ... + a_t) / t``.

    The latent has d + 1 elements. The last one counts the token's loops, so that a token that has left early keeps its
    mean.
    """

    def start(self, a: Tensor) -> Tensor:
        return torch.cat((a, torch.zeros_like(a[..., :1])), dim=-1)

    def forward(self, a: Tensor, latent: Tensor) -> Tensor:
        mean, count = latent[..., :-1], latent[..., -1:] + 1
        return torch.cat((mean + (a - mean) / count, count), dim=-1)

    def read(self, latent: Tensor) -> Tensor:
        return latent[..., :-1]


def make_aggregation(config: MeltConfig) -> Aggregation:
    """Build the aggregation that ``config.aggregation`` names."""
    size, from_input = config.hidden_size, config.latent_init == "first_input"
    match config.aggregation:
        case "gate":
            return LatentGate(size, from_input=from_input)
        case "scalar_gate":
            return LatentGate(size, 1, from_input=from_input)
        case "ema":
            return MovingAverage(config.ema_weight, from_input=from_input)
        case "mean":
            return Mean()
    return Aggregation()
