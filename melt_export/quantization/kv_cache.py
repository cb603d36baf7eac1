"""Caches in 4 or 8 bits for ONNX Runtime: scales, calibrated over all loops, and the graph with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch
from melt_models.configuration import LoopedConfig
from melt_models.layers import rotary_tables, rotate
from melt_runtime.package.specs import StateSpec, TensorSpec
from melt_runtime.progress import Step, no_progress
from torch import Tensor

from ..graph.external_weights import COMPUTED
from ..graph.trace import TracedGraph
from ..reference.pytorch import Reference
from .kv_cache_scales import PARTS, SCALE_INPUT, CacheNumbers, attention_nodes, rounded, scale_name

_ROWS = 2048  # of each layer that scales are tried on, at most
_SHARES = tuple(1 - step / 20 for step in range(13))  # of a channel's largest value that the largest number may be


def calibrated(
    reference: Reference,
    sequences: list[list[int]],
    loops: int,
    chunk: int,
    positions: int,
    bits: int,
    progress: Step = no_progress,
) -> CacheNumbers:
    """Scales for the rows that a model writes in all loops of these sequences of token ids.

    The gate lets a row drift from loop to loop, so all loops count. Keys are also turned to places all over the
    ``positions`` that the cache has: their slow rotary pairs stand still within one sequence, and trade their sizes
    far behind it. Of each channel the scale is the one with the least squared error on a sample of the rows.
    """
    config = reference.config
    rng = np.random.default_rng(0)
    most: dict[str, Tensor] = {}
    sample: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    every = -(-sum(map(len, sequences)) * loops // _ROWS)
    for ids in sequences:
        moved = int(rng.integers(0, max(positions - len(ids), 0) + 1))
        pieces = [ids[at : at + chunk] for at in range(0, len(ids), chunk)]
        for traces in reference.traces(pieces, loops)[0]:
            for trace in traces:
                keys = _turned(torch.from_numpy(trace.keys), config, moved)
                for part, rows in (("key", keys), ("value", torch.from_numpy(trace.values))):
                    largest = rows.abs().amax(2)
                    most[part] = torch.maximum(most.get(part, largest), largest)
                    sample[part].append(rows[:, :, int(rng.integers(0, every)) :: every].clone())
        progress("calibrating the cache", len(sequences), 1)
    return CacheNumbers(bits, *(_best(most[part], torch.cat(sample[part], 2), bits) for part in PARTS))


def _turned(keys: Tensor, config: LoopedConfig, places: int) -> Tensor:
    """Keys (layers, kv_heads, rows, head_dim) as they would be so many places further on."""
    cos, sin = rotary_tables(config, torch.tensor([[places]]))
    length = (cos.square() + sin.square()).sqrt()  # some variants scale what they rotate
    return rotate(keys, cos / length, sin / length)


def _best(most: Tensor, rows: Tensor, bits: int) -> Tensor:
    """most (layers, kv_heads, head_dim), rows (layers, kv_heads, count, head_dim) -> scales as ``most``."""
    widest = torch.where(most > 0, most, 1) / (2 ** (bits - 1) - 1)
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in _SHARES:
        scales = widest * share
        error = (rounded(rows, scales[:, :, None], bits) - rows).square().mean(2)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def quantize_caches(
    graph: TracedGraph, states: list[StateSpec], numbers: CacheNumbers
) -> tuple[TracedGraph, list[StateSpec]]:
    """The loop step and its states with quantized caches; the graph's model is changed in place."""
    for node in attention_nodes(graph.model):
        layer = int(str(node.inputs[3].name).rsplit(".", 1)[1])  # type: ignore[union-attr]
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", numbers.bits)
        for part, at in SCALE_INPUT.items():
            name = f"{part[0]}_quant_type"
            node.attributes[name] = ir.AttrString(name, "PER_CHANNEL")
            node.replace_input_with(at, _scale(graph.model.graph, part, layer, numbers))
    small = {state.input: _small(state, numbers.bits) for state in states if state.kind != "swap"}
    outputs = {state.output: state for state in small.values()}
    for value in (*graph.model.graph.inputs, *graph.model.graph.outputs):
        state = small.get(str(value.name)) or outputs.get(str(value.name))
        if state is not None:
            value.shape = ir.Shape(state.bound_shape)
            value.type = ir.TensorType(ir.DataType[state.dtype.upper()])
    changed = replace(
        graph,
        inputs=tuple(_spec(spec, small.get(spec.name)) for spec in graph.inputs),
        outputs=tuple(_spec(spec, outputs.get(spec.name)) for spec in graph.outputs),
    )
    return changed, [small.get(state.input, state) for state in states]


def _scale(graph: ir.Graph, part: str, layer: int, numbers: CacheNumbers) -> ir.Value:
    scales = numbers.scales(part)[layer].flatten().contiguous()
    value = ir.Value(name=scale_name(part, layer), shape=ir.Shape(scales.shape), type=ir.TensorType(ir.DataType.FLOAT))
    value.meta[COMPUTED] = lambda weights: scales
    graph.initializers[str(value.name)] = value
    return value


def _small(state: StateSpec, bits: int) -> StateSpec:
    *outer, size = state.shape
    if bits == 8:
        return replace(state, dtype="int8")
    return replace(state, dtype="uint8", shape=(*outer, int(size) // 2))


def _spec(spec: TensorSpec, state: StateSpec | None) -> TensorSpec:
    return spec if state is None else replace(spec, dtype=state.dtype, shape=state.bound_shape)
