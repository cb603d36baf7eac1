"""Dialects: how a graph writes the cache and attends over it in ONNX. Exported loop steps differ in nothing else.

A dialect defines the graph's own control input and, for tracing, the ``attend`` that ``MeltModel.loop_step`` calls. To
add one, write a class here and name it in ``DIALECTS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from melt_models import LoopLMConfig
from melt_models.configuration import LoopedConfig
from melt_models.layers import merge_heads, rotate, split_heads
from melt_runtime.package.specs import StateSpec, TensorSpec
from torch import Tensor

from ..errors import ExportError
from .lowering import onnx_node

# Operators that read quantized weights.
MATMUL_NBITS, DEQUANTIZE = "MatMulNBits", "DequantizeLinear"


@dataclass(frozen=True)
class GraphInputs:
    """Inputs of an attention while a loop step is traced.

    - ``lengths``: (batch,) int64, tokens already in the cache.
    - ``control``: the dialect's own input.
    - ``keys``, ``values``: one cache per layer of the stage, (batch, kv_heads, cache_rows, head_dim).
    - ``cos``, ``sin``: rotary tables, (cache_rows, head_dim / 2).
    """

    config: LoopedConfig
    lengths: Tensor
    control: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    cos: Tensor
    sin: Tensor


class GraphAttention(ABC):
    """An ``attend`` that records the graph's outputs: a key and a value tensor per layer."""

    def __init__(self, inputs: GraphInputs):
        self.inputs = inputs
        self.outputs: list[Tensor] = []

    @abstractmethod
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class Dialect(ABC):
    """An ONNX opset, a control input, a kind of caches, and an attention."""

    name: ClassVar[str]
    opset: ClassVar[int]
    control: ClassVar[TensorSpec]
    cache_kind: ClassVar[str] = "in_place"
    attention: ClassVar[type[GraphAttention]]

    head_multiple: ClassVar[int] = 2
    fuses: ClassVar[bool] = False  # whether the exporter fuses operators, because the consumer does not
    quantized_matmul: ClassVar[str | None] = None  # the operator that reads quantized weights, if any

    def check(self, config: LoopedConfig) -> None:
        """Raise ExportError for a model that the dialect cannot express."""
        if config.head_dim % self.head_multiple:
            raise ExportError(
                f"head_dim is {config.head_dim}; attention in the {self.name} dialect needs a multiple of "
                f"{self.head_multiple}: export with --dialect standard or portable"
            )

    def cache_states(self, config: LoopedConfig, dtype: str, cache_rows: int) -> list[StateSpec]:
        """Return the caches as state tensors, key before value, layer by layer.

        A LoopLM's have a first dimension of loops.
        """
        shape: tuple[int | str, ...] = ("batch", config.num_key_value_heads, cache_rows, config.head_dim)
        kind = self.cache_kind
        if _caches_per_loop(config):
            shape = (config.total_ut_steps, *shape)
            kind = {"in_place": "per_loop", "read_only": "per_loop_read_only"}[kind]
        return self._states(config.num_hidden_layers, shape, dtype, kind)

    def stage_states(self, config: LoopedConfig, stage: str, dtype: str, cache_rows: int) -> list[StateSpec]:
        """Return the caches of the "prelude" or the "coda", ordered as the loop step's. A chunk runs these once."""
        layers = config.num_prelude_layers if stage == "prelude" else config.num_coda_layers
        shape = ("batch", config.num_key_value_heads, cache_rows, config.head_dim)
        return self._states(layers, shape, dtype, self.cache_kind, f"{stage}_")

    def _states(
        self, layers: int, shape: tuple[int | str, ...], dtype: str, kind: str, stage: str = ""
    ) -> list[StateSpec]:
        return [
            StateSpec(f"{stage}{part}_cache.{layer}", self.cache_output(f"{stage}{part}", layer), dtype, shape, kind)
            for layer in range(layers)
            for part in ("key", "value")
        ]

    def cache_output(self, part: str, layer: int) -> str:
        return f"next_{part}_cache.{layer}"


def _caches_per_loop(config: LoopedConfig) -> bool:
    return isinstance(config, LoopLMConfig) and config.total_ut_steps > 1


MASK = TensorSpec("attention_mask", "bool", ("batch", 1, "chunk", "context"))


class _GroupQueryAttention(GraphAttention):
    """com.microsoft::GroupQueryAttention: rotates, writes the cache in place and attends over its tokens only."""

    def __init__(self, inputs: GraphInputs):
        super().__init__(inputs)
        # chunk_lengths: number of tokens in the chunk; the columns after them are padding.
        self.chunk_lengths = inputs.control.to(torch.int32)
        self.last_index = (inputs.lengths + inputs.control - 1).clamp(min=0).to(torch.int32)
        self.bound = torch.full((), inputs.keys[0].shape[2], dtype=torch.int32)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        config, keys, values = self.inputs.config, self.inputs.keys[layer], self.inputs.values[layer]
        rotary = (self.inputs.cos, self.inputs.sin)
        operands = (query, key, value, keys, values, self.last_index, self.bound, *rotary, *[None] * 7)
        attributes = {
            "num_heads": config.num_attention_heads,
            "kv_num_heads": config.num_key_value_heads,
            "do_rotary": 1,
            "scale": config.head_dim**-0.5,
            **({"rotary_interleaved": 1} if config.rotary_pairs == "adjacent" else {}),
        }
        output, *caches = onnx_node(
            "GroupQueryAttention",
            (*operands, self.chunk_lengths),
            (0, 3, 4),
            attributes,
            domain="com.microsoft",
        )
        self.outputs += caches
        return output


class OnnxRuntimeDialect(Dialect):
    """For ONNX Runtime, with its fused attention operator."""

    name = "onnxruntime"
    opset = 23
    control = TensorSpec("chunk_lengths", "int64", ("batch",))
    attention = _GroupQueryAttention
    head_multiple = 16
    fuses = True
    quantized_matmul = MATMUL_NBITS


class _RotatedAttention(GraphAttention):
    """Base of attentions without a fused rotary embedding."""

    def __init__(self, inputs: GraphInputs):
        super().__init__(inputs)
        positions = inputs.lengths.unsqueeze(1) + torch.arange(inputs.control.shape[2])
        self.cos, self.sin = F.embedding(positions, inputs.cos), F.embedding(positions, inputs.sin)

    def rotated(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the heads and rotate query and key to their positions.

        Each result is (batch, heads, chunk, head_dim).
        """
        config = self.inputs.config
        query, key, value = (split_heads(x, config.head_dim) for x in (query, key, value))
        query, key = (rotate(x, self.cos, self.sin, config.rotary_pairs) for x in (query, key))
        return query, key, value


class _ScatterAttention(_RotatedAttention):
    """Opset 24: TensorScatter writes the cache, Attention reads as many positions as the mask has columns."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = self.rotated(query, key, value)
        context = self.inputs.control.shape[-1]
        seen = []
        for cache, rows in ((self.inputs.keys[layer], key), (self.inputs.values[layer], value)):
            operands = (cache, rows, self.inputs.lengths)
            [cache] = onnx_node("TensorScatter", operands, [0], {"axis": -2, "mode": "linear"})
            self.outputs.append(cache)
            seen.append(cache[:, :, :context])
        scale = {"scale": self.inputs.config.head_dim**-0.5}
        [output] = onnx_node("Attention", (query, *seen, self.inputs.control), [0], scale)
        return merge_heads(output)


class StandardDialect(Dialect):
    """For TensorRT 10.15+, TensorRT-RTX and other consumers of opset 24."""

    name = "standard"
    opset = 24
    control = MASK
    attention = _ScatterAttention
    quantized_matmul = DEQUANTIZE


class _ReadOnlyCacheAttention(_RotatedAttention):
    """Opset 18: reads the caches without writing them, and returns the chunk's own keys and values as outputs.

    One softmax runs over the scores of past and own positions together. The caller writes the new keys and values once,
    after the last loop. That is right, because past positions do not change while a token loops: a MELT's loops share a
    cache, and a LoopLM's loop reads only its own.
    """

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = self.rotated(query, key, value)
        self.outputs += [key, value]
        mask, config = self.inputs.control, self.inputs.config
        context = mask.shape[-1]
        past_key, past_value = (cache[layer][:, :, :context] for cache in (self.inputs.keys, self.inputs.values))
        groups = config.num_attention_heads // config.num_key_value_heads
        chunk = query.shape[2]
        # (batch, kv_heads, groups * chunk, head_dim): every group of query heads shares a key/value head
        grouped = query.unflatten(1, (config.num_key_value_heads, groups)).flatten(2, 3) * config.head_dim**-0.5

        def scores(keys: Tensor, visible: Tensor) -> Tensor:
            raw = (grouped @ keys.transpose(-1, -2)).unflatten(2, (groups, chunk)).float()
            return torch.where(visible, raw, float("-inf"))

        offset = torch.arange(chunk)
        own = scores(key, offset.unsqueeze(0) <= offset.unsqueeze(1))
        weights = torch.cat((scores(past_key, mask.unsqueeze(2)), own), dim=-1).softmax(-1).to(value.dtype)
        weights = weights.flatten(2, 3)
        output = weights[..., :context] @ past_value + weights[..., context:] @ value
        return merge_heads(output.unflatten(2, (groups, chunk)).flatten(1, 2))


class PortableDialect(Dialect):
    """For TensorRT before 10.15 and all other ONNX consumers."""

    name = "portable"
    opset = 18
    control = MASK
    cache_kind = "read_only"
    attention = _ReadOnlyCacheAttention

    def cache_output(self, part: str, layer: int) -> str:
        return f"{part}_rows.{layer}"


DIALECTS: dict[str, Dialect] = {d.name: d for d in (OnnxRuntimeDialect(), StandardDialect(), PortableDialect())}
