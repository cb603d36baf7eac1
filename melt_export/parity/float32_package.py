"""Copies of packages for comparison: the same graphs and weights, with arithmetic that PyTorch can reproduce."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from melt_runtime.package.manifest import MANIFEST
from melt_runtime.package.reader import Package
from melt_runtime.package.specs import GraphSpec, TensorSpec
from onnx_ir import tensor_adapters

from ..graph.dialects import DEQUANTIZE
from ..quantization.matmul_weights import ACCURACY
from ..quantization.stored_values import stored_values

_BF16, _FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def float32_package(package: Path, directory: Path) -> None:
    """Write a copy of a bf16 package with float32 arithmetic into an empty directory. It has no hashes."""
    manifest = Package.open(package, check_hashes=False).manifest
    for name, graph in manifest.graphs.items():
        model = ir.load(package / graph.file)
        _widen(model.graph)
        ir.save(model, directory / graph.file, external_data=f"{name}.data")
    copy = replace(
        manifest,
        precision="fp32",
        files={},
        graphs={
            name: GraphSpec(graph.file, _wide(graph.inputs), _wide(graph.outputs))
            for name, graph in manifest.graphs.items()
        },
        states=tuple(replace(state, dtype=_wide_name(state.dtype)) for state in manifest.states),
    )
    copy = replace(copy, files=_presence_only(directory))
    (directory / MANIFEST).write_text(copy.to_json(), encoding="utf-8")


def wide_package(package: Path, directory: Path) -> None:
    """Write a copy of a quantized package with float activations into an empty directory on the same disk.

    Its matmuls read the same stored values without rounding activations (which ONNX Runtime would round to 8 bits after
    a DequantizeLinear, too), so that PyTorch on these values must agree. Unchanged weights are hard links to the
    package's weights file. It has no hashes.
    """
    manifest = Package.open(package, check_hashes=False).manifest
    for name, graph in manifest.graphs.items():
        model = ir.load(package / graph.file)
        for node in model.graph.all_nodes():
            node.attributes.pop(ACCURACY, None)
        folded = _fold(model.graph)
        ir.save(model, directory / graph.file, external_data=f"{name}.wide.data" if folded else None)
    for name in manifest.files:
        if name.endswith(".data"):
            (directory / name).hardlink_to(package / name)
    copy = replace(manifest, files=_presence_only(directory), engines={})
    (directory / MANIFEST).write_text(copy.to_json(), encoding="utf-8")


def _fold(graph: ir.Graph) -> bool:
    """Replace all DequantizeLinear nodes by their values, computed when they are written.

    Returns whether there were any.
    """
    nodes = [node for node in graph if node.op_type == DEQUANTIZE]
    for node in nodes:
        wide = node.outputs[0]
        value = ir.Value(name=wide.name, shape=wide.shape, type=wide.type)
        value.const_value = _folded(node, wide)
        wide.replace_all_uses_with(value)
        wide.name = None
        numbers = [str(operand.name) for operand in node.inputs if operand is not None]
        graph.remove(node)  # the removed node keeps its inputs, which are read when the values are written
        for name in numbers:
            del graph.initializers[name]
        graph.initializers[str(value.name)] = value
    return bool(nodes)


def _folded(node: ir.Node, wide: ir.Value) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        values = stored_values(node)[1].t().contiguous()
        return tensor_adapters.TorchTensor(values.to(tensor_adapters.to_torch_dtype(wide.dtype)), name=wide.name)  # type: ignore[arg-type]

    return ir.LazyTensor(read, dtype=wide.dtype, shape=wide.shape, name=wide.name)  # type: ignore[arg-type]


def _presence_only(directory: Path) -> dict:
    return {p.name: {"sha256": "", "bytes": p.stat().st_size} for p in directory.iterdir() if p.is_file()}


def _wide_name(dtype: str) -> str:
    return "float32" if dtype == "bfloat16" else dtype


def _wide(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, dtype=_wide_name(spec.dtype)) for spec in specs)


def _widen(graph: ir.Graph) -> None:
    """Change every bf16 value, constant and cast of a graph to float32, in place."""
    results = (output for node in graph.all_nodes() for output in node.outputs)
    for value in [*graph.inputs, *graph.initializers.values(), *results]:
        if value.dtype == _BF16:
            value.dtype = _FP32
        if value.const_value is not None and value.const_value.dtype == _BF16:
            value.const_value = _widened(value.const_value)
    for node in graph.all_nodes():
        target = node.attributes.get("to")
        if node.op_type == "Cast" and target is not None and target.as_int() == _BF16:
            node.attributes["to"] = ir.AttrInt64("to", int(_FP32))


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(read, dtype=_FP32, shape=tensor.shape, name=tensor.name)  # type: ignore[arg-type]
