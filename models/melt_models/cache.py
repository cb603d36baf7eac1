"""MELT's shared key/value cache in PyTorch: one key and value per token and layer, rewritten by every loop."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .configuration import MeltConfig
from .layers import masked_attention, merge_heads, rotary_tables, rotate, split_heads

Rows = tuple[Tensor, Tensor]  # keys and values, each (batch, kv_heads, positions, head_dim)
Stored = Callable[[int, Tensor, Tensor], Rows]


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

    def write(self, layer: int, key: Tensor, value: Tensor) -> Rows:
        """Store the open chunk's keys and values of a layer and return all positions, committed ones first.

        key, value: (batch, kv_heads, chunk, head_dim); returned: (batch, kv_heads, positions, head_dim) each.
        """
        slot: Any = self.layers[layer]
        slot.keys, slot.values = self.join(layer, self.committed(layer), key, value)
        slot.is_initialized = True
        return slot.keys, slot.values

    def committed(self, layer: int) -> Rows | None:
        """Return a layer's keys and values without the open chunk's; None before the first commit."""
        if self.valid is None:
            return None
        slot: Any = self.layers[layer]
        count = self.valid.shape[1]
        return slot.keys[:, :, :count], slot.values[:, :, :count]

    def join(self, layer: int, committed: Rows | None, key: Tensor, value: Tensor) -> Rows:
        """Return what ``write`` would, and store nothing."""
        if self.stored is not None:
            key, value = self.stored(layer, key, value)
        if committed is None:
            return key, value
        return torch.cat((committed[0], key), dim=2), torch.cat((committed[1], value), dim=2)

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


class _WrittenOnce:
    """Writes one layer's keys and values. The second call, in a backward pass, joins them with the same committed
    positions, and leaves the cache as it is: later chunks have been committed by then.

    ``committed``: what the chunk's loops found there, for all of them.
    """

    def __init__(self, cache: MeltCache, committed: dict[int, Rows | None]):
        self._cache, self._committed, self._written = cache, committed, False

    def __call__(self, layer: int, key: Tensor, value: Tensor) -> Rows:
        if not self._written:
            self._written = True
            self._committed.setdefault(layer, self._cache.committed(layer))
            return self._cache.write(layer, key, value)
        return self._cache.join(layer, self._committed[layer], key, value)


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
        self.write: Callable[[int, Tensor, Tensor], Rows] = cache.write
        self._committed: dict[int, Rows | None] = {}

    def repeatable(self) -> ChunkAttention:
        made = copy(self)
        made.write = _WrittenOnce(self.cache, self._committed)
        return made

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (split_heads(x, self.config.head_dim) for x in (query, key, value))
        query, key = (rotate(x, self.cos, self.sin, self.config.rotary_pairs) for x in (query, key))
        keys, values = self.write(self.first + layer, key, value)
        return merge_heads(masked_attention(query, keys, values, self.mask))
