"""How "write the row and attend" is spelled in ONNX: the only thing in which exported loop steps differ.

A dialect gives the graph its control inputs beyond the common ones and, while the graph is traced, the ``attend`` that
``MeltModel.loop_step`` calls. To add one, write a class here and name it in ``DIALECTS``.
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
from melt_runtime.package.specs import StateSpec, TensorSpec, new_positions_shape
from torch import Tensor

from ..errors import ExportError
from .lowering import onnx_node

# The operators that read quantized weights.
MATMUL_NBITS, DEQUANTIZE = "MatMulNBits", "DequantizeLinear"


@dataclass(frozen=True)
class GraphInputs:
    """What an attention needs while a loop step is traced.

    lengths (batch,) int64 tokens already in the cache; control: the dialect's own input; keys, values: one cache a
    layer (batch, kv_heads, rows, head_dim); cos, sin: rotary tables (rows, head_dim / 2).
    """

    config: LoopedConfig
    lengths: Tensor
    control: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    cos: Tensor
    sin: Tensor


class GraphAttention(ABC):
    """An ``attend`` that records what the graph must give back: a key and a value tensor a layer."""

    def __init__(self, inputs: GraphInputs):
        self.inputs = inputs
        self.outputs: list[Tensor] = []

    @abstractmethod
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class Dialect(ABC):
    """One spelling: its ONNX opset, its control input, what becomes of the caches, and its attention."""

    name: ClassVar[str]
    opset: ClassVar[int]
    control: ClassVar[TensorSpec]
    cache_kind: ClassVar[str] = "in_place"
    attention: ClassVar[type[GraphAttention]]

    head_multiple: ClassVar[int] = 2
    fuses: ClassVar[bool] = False  # where what runs the graph does not do it by itself
    products: ClassVar[str | None] = None  # the operator that reads quantized weights, if there is one

    def check(self, config: LoopedConfig) -> None:
        """Raises ExportError for a model that the dialect cannot express."""
        if _caches_per_loop(config) and self.cache_kind != "in_place":
            raise ExportError(
                f"a LoopLM writes its caches in every loop, the {self.name} dialect once after the last: "
                "export with --dialect onnxruntime or standard"
            )
        if config.head_dim % self.head_multiple:
            raise ExportError(
                f"head_dim is {config.head_dim}; attention in the {self.name} dialect needs a multiple of "
                f"{self.head_multiple}: export with --dialect standard or portable"
            )

    def cache_states(self, config: LoopedConfig, dtype: str, cache_rows: int) -> list[StateSpec]:
        """The caches as state tensors, key before value, layer by layer; a LoopLM's with its loops in front."""
        shape: tuple[int | str, ...] = ("batch", config.num_key_value_heads, cache_rows, config.head_dim)
        kind = self.cache_kind
        if _caches_per_loop(config):
            shape, kind = (config.total_ut_steps, *shape), "per_loop"
        return [
            StateSpec(f"{part}_cache.{layer}", self.cache_output(part, layer), dtype, shape, kind)
            for layer in range(config.num_hidden_layers)
            for part in ("key", "value")
        ]

    def cache_output(self, part: str, layer: int) -> str:
        return f"next_{part}_cache.{layer}"

    def output_shape(self, state: StateSpec) -> tuple[int | str, ...]:
        """The shape of what the graph gives back for a cache."""
        return state.bound_shape


def _caches_per_loop(config: LoopedConfig) -> bool:
    return isinstance(config, LoopLMConfig) and config.total_ut_steps > 1


MASK = TensorSpec("attention_mask", "bool", ("batch", 1, "chunk", "context"))


class _GroupQueryAttention(GraphAttention):
    """com.microsoft::GroupQueryAttention rotates, writes the rows in place and attends; its cost follows the tokens."""

    def __init__(self, inputs: GraphInputs):
        super().__init__(inputs)
        # chunk_lengths: of the chunk's columns only so many are tokens, the rest is padding on the right.
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
    """For ONNX Runtime: one fused operator of its own."""

    name = "onnxruntime"
    opset = 23
    control = TensorSpec("chunk_lengths", "int64", ("batch",))
    attention = _GroupQueryAttention
    head_multiple = 16
    fuses = True
    products = MATMUL_NBITS


class _RotatedAttention(GraphAttention):
    """What the two dialects without a fused rotary embedding share."""

    def __init__(self, inputs: GraphInputs):
        super().__init__(inputs)
        positions = inputs.lengths.unsqueeze(1) + torch.arange(inputs.control.shape[2])
        self.cos, self.sin = F.embedding(positions, inputs.cos), F.embedding(positions, inputs.sin)

    def rotated(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Splits the heads and rotates query and key to their positions: (batch, heads, chunk, head_dim) each."""
        query, key, value = (split_heads(x, self.inputs.config.head_dim) for x in (query, key, value))
        return rotate(query, self.cos, self.sin), rotate(key, self.cos, self.sin), value


class _ScatterAttention(_RotatedAttention):
    """Opset 24: TensorScatter writes the rows, Attention reads as many of them as the mask is wide."""

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
    """For TensorRT 10.15+, TensorRT-RTX and every consumer of opset 24."""

    name = "standard"
    opset = 24
    control = MASK
    attention = _ScatterAttention
    products = DEQUANTIZE


class _RowsAttention(_RotatedAttention):
    """Nothing newer than opset 18: the caches are only read, the chunk's own rows stay inside and leave as outputs.

    One softmax runs over the scores of past and own rows together. Right for MELT because past rows do not change
    while a token loops, so the caller writes the new ones once, after the last loop.
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
    """For TensorRT before 10.15 and every other ONNX consumer."""

    name = "portable"
    opset = 18
    control = MASK
    cache_kind = "read_only"
    attention = _RowsAttention

    def cache_output(self, part: str, layer: int) -> str:
        return f"{part}_rows.{layer}"

    def output_shape(self, state: StateSpec) -> tuple[int | str, ...]:
        return new_positions_shape(state.shape)


DIALECTS: dict[str, Dialect] = {d.name: d for d in (OnnxRuntimeDialect(), StandardDialect(), PortableDialect())}
