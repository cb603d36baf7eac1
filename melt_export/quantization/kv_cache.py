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
from .kv_cache_scales import (
    CACHE_INPUT,
    KEY_AND_VALUE,
    SCALE_INPUT,
    CacheScales,
    attention_nodes,
    cache_order,
    rounded,
    scale_name,
)

_ROWS = 2048  # most positions per layer on which scales are tried
_SHARES = tuple(1 - step / 20 for step in range(13))  # factors on a channel's scale


def calibrated(
    reference: Reference,
    sequences: list[list[int]],
    loops: int,
    chunk: int,
    positions: int,
    bits: int,
    progress: Step = no_progress,
) -> CacheScales:
    """Compute scales for the keys and values of all loops over these sequences of token ids.

    All loops count, because the gate changes keys and values from loop to loop. Keys are also rotated to places all
    over the ``positions`` of the cache: within one sequence their slow rotary pairs hardly turn, but far behind it
    their sizes change places. Each channel gets the scale with the least squared error on a sample of positions.
    """
    config = reference.config
    rng = np.random.default_rng(0)
    most: dict[str, Tensor] = {}
    sample: dict[str, list[Tensor]] = {part: [] for part in KEY_AND_VALUE}
    every = -(-sum(map(len, sequences)) * loops // _ROWS)
    for ids in sequences:
        moved = int(rng.integers(0, max(positions - len(ids), 0) + 1))
        chunks = [ids[at : at + chunk] for at in range(0, len(ids), chunk)]
        for traces in reference.traces(chunks, loops)[0]:
            for trace in traces:
                keys = _turned(torch.from_numpy(trace.keys), config, moved)
                for part, rows in (("key", keys), ("value", torch.from_numpy(trace.values))):
                    largest = rows.abs().amax(2)
                    most[part] = torch.maximum(most.get(part, largest), largest)
                    sample[part].append(rows[:, :, int(rng.integers(0, every)) :: every].clone())
        progress("calibrating the cache", len(sequences), 1)
    return CacheScales(bits, *(_best(most[part], torch.cat(sample[part], 2), bits) for part in KEY_AND_VALUE))


def _turned(keys: Tensor, config: LoopedConfig, places: int) -> Tensor:
    """Rotate keys (layers, kv_heads, positions, head_dim) to ``places`` positions further on."""
    cos, sin = rotary_tables(config, torch.tensor([[places]]))
    length = (cos.square() + sin.square()).sqrt()  # some RoPE variants also scale
    return rotate(keys, cos / length, sin / length, config.rotary_pairs)


def _best(most: Tensor, rows: Tensor, bits: int) -> Tensor:
    """Return the best scale per channel, (layers, kv_heads, head_dim).

    most: the largest values, (layers, kv_heads, head_dim); rows: a sample, (layers, kv_heads, count, head_dim).
    """
    widest = torch.where(most > 0, most, 1) / (2 ** (bits - 1) - 1)
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in _SHARES:
        scales = widest * share
        error = (rounded(rows, scales[:, :, None], bits) - rows).square().mean(2)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def quantize_caches(
    graphs: dict[str, TracedGraph], states: list[StateSpec], cache_scales: CacheScales
) -> tuple[dict[str, TracedGraph], list[StateSpec]]:
    """Return all graphs and states with quantized caches. Changes the graphs' models in place."""
    quantized = quantized_states(states, cache_scales.bits)
    small = {state.input: state for state in quantized if state.kind != "swap"}
    order = cache_order(small)
    changed = {name: _quantized(graph, small, cache_scales, order) for name, graph in graphs.items()}
    return changed, quantized


def quantized_states(states: list[StateSpec], bits: int) -> list[StateSpec]:
    """Return the states with caches of so many bits."""
    return [state if state.kind == "swap" else _small(state, bits) for state in states]


def _quantized(
    graph: TracedGraph, small: dict[str, StateSpec], cache_scales: CacheScales, order: list[str]
) -> TracedGraph:
    """Return a graph with quantized caches. ``order``: the key caches, as the scales are ordered."""
    for node in attention_nodes(graph.model):
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", cache_scales.bits)
        for part, at in SCALE_INPUT.items():
            name = f"{part[0]}_quant_type"
            node.attributes[name] = ir.AttrString(name, "PER_CHANNEL")
            keys, cache = (str(node.inputs[index].name) for index in (CACHE_INPUT["key"], CACHE_INPUT[part]))  # type: ignore[union-attr]
            scales = cache_scales.scales(part)[order.index(keys)]
            node.replace_input_with(at, _scale(graph.model.graph, cache, scales))
    outputs = {state.output: state for state in small.values()}
    for value in (*graph.model.graph.inputs, *graph.model.graph.outputs):
        state = small.get(str(value.name)) or outputs.get(str(value.name))
        if state is not None:
            value.shape = ir.Shape(state.bound_shape)
            value.type = ir.TensorType(ir.DataType[state.dtype.upper()])
    return replace(
        graph,
        inputs=tuple(_spec(spec, small.get(spec.name)) for spec in graph.inputs),
        outputs=tuple(_spec(spec, outputs.get(spec.name)) for spec in graph.outputs),
    )


def _scale(graph: ir.Graph, cache: str, of_layer: Tensor) -> ir.Value:
    scales = of_layer.flatten().contiguous()
    value = ir.Value(name=scale_name(cache), shape=ir.Shape(scales.shape), type=ir.TensorType(ir.DataType.FLOAT))
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
