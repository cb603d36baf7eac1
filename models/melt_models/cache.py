"""MELT's shared key/value cache in PyTorch: one row a token and layer, rewritten by every loop."""

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
    """The rows of all committed chunks, and the chunk that is looping now ("open").

    ``layers[l].keys`` and ``.values`` are (batch, kv_heads, rows, head_dim). Rows never change in place: an update
    joins the committed rows with the open chunk's new ones, so gradients flow across chunks. In a batch of
    different lengths shorter sequences leave holes; ``valid`` (batch, rows) says which rows are tokens.
    stored: what the cache keeps of a layer's new keys and values, where it cannot keep them exactly.
    """

    def __init__(self, num_layers: int, stored: Stored | None = None):
        super().__init__(layers=[DynamicLayer() for _ in range(num_layers)])
        self.stored = stored
        self.valid: Tensor | None = None
        self.lengths: Tensor | None = None  # (batch,) tokens committed
        self.columns = 0  # input columns seen, padding included: what generate() calls the sequence length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Makes (key, value) the open chunk's rows of a layer; returns all rows, committed ones first."""
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
        """Closes the open chunk. valid: (batch, chunk) bool, which of its rows are tokens."""
        added = valid.sum(1)
        self.valid = valid if self.valid is None else torch.cat((self.valid, valid), dim=1)
        self.lengths = added if self.lengths is None else self.lengths + added

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: assisted decoding would need to take rows back."""
        raise ValueError("a MeltCache cannot be cropped; assisted decoding is not supported")

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        if self.valid is not None and self.lengths is not None:
            self.valid, self.lengths = self.valid[beam_idx], self.lengths[beam_idx]


class ChunkAttention:
    """The reference way to write the row and attend: what every exported dialect is compared with.

    A token sees the valid committed rows, and its own chunk's rows up to itself.
    """

    def __init__(self, config: MeltConfig, cache: MeltCache, valid: Tensor):
        self.head_dim, self.cache = config.head_dim, cache
        batch, chunk = valid.shape
        offset = torch.arange(chunk, device=valid.device)
        past = torch.zeros(batch, 0, dtype=torch.bool, device=valid.device) if cache.valid is None else cache.valid
        lengths = past.sum(1) if cache.lengths is None else cache.lengths
        own = (offset[None, :] <= offset[:, None]).expand(batch, -1, -1)
        self.mask = torch.cat((past[:, None].expand(-1, chunk, -1), own), dim=-1)
        self.cos, self.sin = rotary_tables(config, lengths[:, None] + offset)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (split_heads(x, self.head_dim) for x in (query, key, value))
        keys, values = self.cache.write(layer, rotate(key, self.cos, self.sin), value)
        return merge_heads(masked_attention(rotate(query, self.cos, self.sin), keys, values, self.mask))
