"""How many bits a model's stored weights have."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def onnx_weights(directory: Path) -> dict[str, Any]:
    """Describe the weights of a directory's ONNX files: "layers", "head" and "embedding", and "bytes" of all of them.

    Matrices of float weights are called "float".
    """
    import onnx

    kinds: dict[str, set[str]] = {}
    for file in sorted(directory.glob("*.onnx")):
        model = onnx.load(file, load_external_data=False)
        types = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            stored = [types[name] for name in node.input if name in types]
            if node.op_type in ("Gather", "GatherBlockQuantized") and "embed" in f"{file.stem}/{node.name}":
                part = "embedding"
            elif node.op_type in ("MatMul", "Gemm", "MatMulNBits"):
                part = "head" if "lm_head" in f"{file.stem}/{node.name}" else "layers"
            else:
                continue
            if any(min(tensor.dims[-2:], default=1) > 1 and len(tensor.dims) > 1 for tensor in stored):
                kinds.setdefault(part, set()).add(_bits(node, stored))
    total = sum(file.stat().st_size for file in directory.iterdir() if file.suffix == ".data")
    return {part: " and ".join(sorted(found)) for part, found in sorted(kinds.items())} | {"bytes": total}


def _bits(node: Any, stored: list[Any]) -> str:
    """Describe one matrix: "int4, blocks of 32, float32 scales"."""
    from onnx import TensorProto

    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if "block_size" not in attributes:
        return "float"
    floats = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    scales = next((floats[tensor.data_type] for tensor in stored if tensor.data_type in floats), "unknown")
    arithmetic = ", 8-bit activations" if attributes.get("accuracy_level") == 4 else ""
    return f"int{attributes.get('bits', 4)}, blocks of {attributes['block_size']}, {scales} scales{arithmetic}"
