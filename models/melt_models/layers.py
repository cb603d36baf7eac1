"""Building blocks of all models: RMSNorm, rotary embedding, attention, MLP."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration import LoopedConfig


class Attend(Protocol):
    """Callable that writes a layer's new keys and values into a cache and attends over it.

    Everything in which caches, and the dialects of exported graphs, differ is behind this call. query: (batch, chunk,
    heads * head_dim); key, value: (batch, chunk, kv_heads * head_dim), all **before** rotary embedding. Returns (batch,
    chunk, heads * head_dim).
    """

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


@runtime_checkable
class WritingAttend(Attend, Protocol):
    """An ``Attend`` that must not be called again in the backward pass, as gradient checkpointing does."""

    def repeatable(self) -> Attend:
        """Return one for a single call and its repetition, which attends over the same positions."""
        ...


def widen(x: Tensor) -> Tensor:
    """Cast x to float32, or leave it where its type is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """RMS norm, ``x / rms(x) * weight``, computed in float32 or wider (arXiv 1910.07467). Keeps the shape."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = float(eps)  # PyTorch takes no whole number of more than 64 bits

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.weight.dtype == torch.float32:  # one kernel instead of seven; never exported
            return F.rms_norm(widen(x), self.weight.shape, self.weight, self.eps)
        wide = widen(x)
        wide = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)  # ONNX Runtime fuses this form
        return self.weight * wide.to(x.dtype)


def rotary_tables(config: LoopedConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for ``positions`` (any shape): two float32 tensors (*positions.shape, head_dim / 2).

    RoPE is arXiv 2104.09864; its scaled variants are computed by transformers.
    """
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
        frequencies, scale = 1.0 / (rope["rope_theta"] ** exponent), 1.0
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, positions.device)
    angles = positions[..., None].float() * frequencies
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: str = "halves") -> Tensor:
    """Apply RoPE to the pairs of elements that ``LoopedConfig.rotary_pairs`` names.

    x: (batch, heads, chunk, head_dim); cos, sin: (batch, chunk, head_dim / 2).
    """
    cos, sin = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
    if pairs == "adjacent":
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Reshape (batch, chunk, heads * head_dim) to (batch, heads, chunk, head_dim)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Reshape (batch, heads, chunk, head_dim) to (batch, chunk, heads * head_dim)."""
    return x.transpose(1, 2).flatten(-2)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend with grouped queries.

    query: (b, heads, c, d); key, value: (b, kv_heads, n, d); mask: (b or 1, c, n) bool.
    """
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.unsqueeze(1), enable_gqa=grouped)


class Attention(nn.Module):
    """Query, key, value and output projections around ``attend``. Queries read ``x``, keys and values read ``kv``.

    ``layer`` counts within a stage: prelude, core or coda.
    """

    def __init__(self, config: LoopedConfig, layer: int):
        super().__init__()
        self.layer = layer
        d, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(d, heads * config.head_dim, bias=config.qk_bias)
        self.k_proj = nn.Linear(d, kv_heads * config.head_dim, bias=config.qk_bias)
        self.v_proj = nn.Linear(d, kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.head_dim, d, bias=False)
        # RMS norm over all heads at once, before they are split.
        self.q_norm = RMSNorm(heads * config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(kv_heads * config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, kv: Tensor, attend: Attend) -> Tensor:
        """Project, attend and project the output. x, kv: (batch, chunk, d), kept."""
        query, key = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(kv))
        return self.o_proj(attend(self.layer, query, key, self.v_proj(kv)))


class MLP(nn.Module):
    """SwiGLU without biases: ``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202)."""

    def __init__(self, config: LoopedConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def leave_early(remaining: Tensor, exit_probability: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Update the probability that a token is still looping, and decide which tokens leave.

    With lambda_t the exit probability of loop t, a token has left by loop t with the cumulative probability 1 -
    prod_{j<=t}(1 - lambda_j) (arXiv 2510.25741), and leaves once that reaches ``threshold``. With a threshold of 1 or
    more no token leaves early. All tensors are (batch, chunk). Returns (remaining, leaves).
    """
    remaining = remaining * (1.0 - exit_probability)
    if threshold >= 1.0:
        return remaining, torch.zeros_like(remaining, dtype=torch.bool)
    return remaining, (1.0 - remaining) >= threshold
