"""Twins of packages for comparison: the same graphs and weights, with arithmetic that PyTorch can be held against."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from melt_runtime.package import MANIFEST, GraphSpec, Package, TensorSpec

from .quantize import ACCURACY

_BF16, _FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def float32_twin(package: Path, directory: Path) -> None:
    """Writes the twin of ``package`` into an empty directory. Its hashes are not made: it is for comparison only."""
    manifest = Package.open(package, check_hashes=False).manifest
    for name, graph in manifest.graphs.items():
        model = ir.load(package / graph.file)
        _widen(model.graph)
        ir.save(model, directory / graph.file, external_data=f"{name}.data")
    twin = replace(
        manifest,
        precision="fp32",
        files={},
        graphs={
            name: GraphSpec(graph.file, _wide(graph.inputs), _wide(graph.outputs))
            for name, graph in manifest.graphs.items()
        },
        states=tuple(replace(state, dtype=_wide_name(state.dtype)) for state in manifest.states),
    )
    twin = replace(twin, files=_presence_only(directory))
    (directory / MANIFEST).write_text(twin.to_json(), encoding="utf-8")


def wide_twin(package: Path, directory: Path) -> None:
    """Writes a twin of a package with quantized weights into an empty directory on the same disk.

    Its products read the same stored numbers, but leave the activations in float32; so the graphs and the numbers can
    be proven to be what PyTorch computes with. The weights file is shared. Its hashes are not made.
    """
    manifest = Package.open(package, check_hashes=False).manifest
    for graph in manifest.graphs.values():
        model = onnx.load(package / graph.file, load_external_data=False)
        for node in model.graph.node:
            kept = [attribute for attribute in node.attribute if attribute.name != ACCURACY]
            del node.attribute[:]
            node.attribute.extend(kept)
        onnx.save(model, directory / graph.file)
    for name in manifest.files:
        if not (directory / name).exists() and name.endswith(".data"):
            (directory / name).hardlink_to(package / name)
    twin = replace(manifest, files=_presence_only(directory), engines={})
    (directory / MANIFEST).write_text(twin.to_json(), encoding="utf-8")


def _presence_only(directory: Path) -> dict:
    return {p.name: {"sha256": "", "bytes": p.stat().st_size} for p in directory.iterdir() if p.is_file()}


def _wide_name(dtype: str) -> str:
    return "float32" if dtype == "bfloat16" else dtype


def _wide(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, dtype=_wide_name(spec.dtype)) for spec in specs)


def _widen(graph: ir.Graph) -> None:
    """Turns every bf16 value, constant and cast of a graph into float32, in place."""
    for value in [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]:
        if value.dtype == _BF16:
            value.dtype = _FP32
        if value.const_value is not None and value.const_value.dtype == _BF16:
            value.const_value = _widened(value.const_value)
    for node in graph:
        target = node.attributes.get("to")
        if node.op_type == "Cast" and target is not None and target.as_int() == _BF16:
            node.attributes["to"] = ir.AttrInt64("to", int(_FP32))


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(read, dtype=_FP32, shape=tensor.shape, name=tensor.name)  # type: ignore[arg-type]
