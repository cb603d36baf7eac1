"""MELT's shared key/value cache in PyTorch: one key and value per token and layer, rewritten by every loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .configuration import MeltConfig
from .layers import masked_attention, merge_heads, rotary_tables, rotate, split_heads

Stored = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class MeltCache(Cache):
    """Keys and values of all committed chunks, and of the chunk that is looping now (the open chunk).

    ``layers[l].keys`` and ``.values`` are (batch, kv_heads, positions, head_dim). Nothing is written in place:
    ``write`` joins the committed positions with the open chunk's, so gradients flow across chunks. In a batch of
    different lengths shorter sequences leave gaps; ``valid`` (batch, positions) marks the positions that hold tokens.

    ``stored``, if given, maps (layer, key, value) to the values that the cache keeps instead, such as quantized ones.
    """

    def __init__(self, num_layers: int, stored: Stored | None = None):
        super().__init__(layers=[DynamicLayer() for _ in range(num_layers)])
        self.stored = stored
        self.valid: Tensor | None = None
        self.lengths: Tensor | None = None  # (batch,) committed tokens
        self.columns = 0  # input columns so far, padding included; generate() calls this the sequence length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the open chunk's keys and values of a layer and return all positions, committed ones first.

        key, value: (batch, kv_heads, chunk, head_dim); returned: (batch, kv_heads, positions, head_dim) each.
        """
        if self.stored is not None:
            key, value = self.stored(layer, key, value)
        slot: Any = self.layers[layer]
        committed = 0 if self.valid is None else self.valid.shape[1]
        if committed:
            key = torch.cat((slot.keys[:, :, :committed], key), dim=2)
            value = torch.cat((slot.values[:, :, :committed], value), dim=2)
        slot.keys, slot.values, slot.is_initialized = key, value, True
        return key, value

    def commit(self, valid: Tensor) -> None:
        """Close the open chunk. valid: (batch, chunk) bool, True where a position holds a token."""
        added = valid.sum(1)
        self.valid = valid if self.valid is None else torch.cat((self.valid, valid), dim=1)
        self.lengths = added if self.lengths is None else self.lengths + added

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: assisted decoding, which crops its cache, is not supported."""
        raise ValueError("a MeltCache cannot be cropped; assisted decoding is not supported")

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        if self.valid is not None and self.lengths is not None:
            self.valid, self.lengths = self.valid[beam_idx], self.lengths[beam_idx]


class ChunkAttention:
    """Writes the cache and attends over it in plain PyTorch: the reference for every exported dialect.

    A token attends to the valid committed positions, and to its own chunk up to itself. ``first`` is the number of the
    stage's first cache (see ``LoopedConfig.first_cache``).
    """

    def __init__(self, config: MeltConfig, cache: MeltCache, valid: Tensor, first: int = 0):
        self.config, self.cache, self.first = config, cache, first
        batch, chunk = valid.shape
        offset = torch.arange(chunk, device=valid.device)
        past = torch.zeros(batch, 0, dtype=torch.bool, device=valid.device) if cache.valid is None else cache.valid
        lengths = past.sum(1) if cache.lengths is None else cache.lengths
        own = (offset[None, :] <= offset[:, None]).expand(batch, -1, -1)
        self.mask = torch.cat((past[:, None].expand(-1, chunk, -1), own), dim=-1)
        self.positions = lengths[:, None] + offset
        self.cos, self.sin = rotary_tables(config, self.positions)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (split_heads(x, self.config.head_dim) for x in (query, key, value))
        query, key = (rotate(x, self.cos, self.sin, self.config.rotary_pairs) for x in (query, key))
        keys, values = self.cache.write(self.first + layer, key, value)
        return merge_heads(masked_attention(query, keys, values, self.mask))
