"""Dequantized values of a package, for the PyTorch that it is compared with."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from melt_runtime.package.reader import Package
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..graph.dialects import DEQUANTIZE, MATMUL_NBITS
from ..graph.merge_matmuls import names_in
from ..reference.pytorch import Reference, linear_layers, reference_of
from .blocks import Blocks
from .kv_cache_scales import CacheScales, initializer
from .matmul_weights import EMBEDDING, GATHER_QUANTIZED


def packaged_reference(checkpoint: Checkpoint, package: Package) -> Reference:
    """Return the reference that computes with a package's stored weights and caches.

    If weights are quantized, the model holds their dequantized values as float32. Raises CheckpointError.
    """
    model, numbers = checkpoint.load(), CacheScales.of(package)
    if package.manifest.weights:
        dequantized(model, package.directory)
    return reference_of(model, None if numbers is None else numbers.rounded)


def dequantized(model: nn.Module, package: Path) -> None:
    """Replace a PyTorch model's weights by the values that its quantized package stores: float32, in place.

    Raises ExportError for a weight of the package that the model lacks.
    """
    linear = linear_layers(model)
    for graph in sorted(package.glob("*.onnx")):
        for node in ir.load(graph).graph.all_nodes():
            if node.op_type not in _STORED_VALUES:
                continue
            label, values = stored_values(node)
            for name in names_in(label, linear):
                module = linear[name]
                module.weight = nn.Parameter(values[: module.out_features].clone(), requires_grad=False)
                values = values[module.out_features :]
    table = model.get_submodule(EMBEDDING.removesuffix(".weight"))
    rows = stored_embedding(package, table.weight)  # type: ignore[arg-type]
    table.weight = nn.Parameter(rows.float(), requires_grad=False)


def stored_embedding(package: Path, table: Tensor) -> Tensor:
    """Return the embedding that a quantized package stores of a ``table`` (vocab, d): float32, or float16."""
    for node in ir.load(package / "embed.onnx").graph:
        if node.op_type == GATHER_QUANTIZED:
            numbers, scales = (initializer(node.inputs[at]) for at in (0, 2))
            bits, block = (node.attributes[name].as_int() for name in ("bits", "block_size"))
            packed = numbers.to(torch.uint8).unflatten(1, (-1, block * bits // 8))
            return Blocks.unpacked(packed, scales, bits, table.shape[1]).values()
    return table.half()


def _nbits_values(node: ir.Node) -> tuple[str, Tensor]:
    numbers, scales = (initializer(node.inputs[at]) for at in (1, 2))
    zeros = initializer(node.inputs[3]).to(torch.uint8) if len(node.inputs) > 3 else None
    bits, inputs = (node.attributes[name].as_int() for name in ("bits", "K"))
    return _label(node.inputs[1]), Blocks.unpacked(numbers.to(torch.uint8), scales, bits, inputs, zeros).values()


def _dequantize_values(node: ir.Node) -> tuple[str, Tensor]:
    numbers, scales = (initializer(value) for value in node.inputs)
    blocks = numbers.unflatten(0, (-1, 1 if scales.dim() == 1 else numbers.shape[0] // scales.shape[0]))
    return _label(node.inputs[0]), (blocks * (scales if scales.dim() == 1 else scales[:, None])).flatten(0, 1).t()


_STORED_VALUES = {MATMUL_NBITS: _nbits_values, DEQUANTIZE: _dequantize_values}


def stored_values(node: ir.Node) -> tuple[str, Tensor]:
    """Return the name of the weight that a node reads, and its dequantized values, float32 (outputs, inputs)."""
    return _STORED_VALUES[node.op_type](node)


def _label(value: ir.Value | None) -> str:
    assert value is not None
    return str(value.name).removesuffix(".q")
