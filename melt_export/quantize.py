"""Weights stored in 4 or 8 bits for ONNX Runtime: which products, in what form, and what the stored numbers mean.

A weight is cut into blocks along its inputs; each block has one float32 scale, and whole numbers beside it
(MatMulNBits). Products compute on activations in 8 bits, which is where most of the time is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from melt_models.checkpoint import Weights
from onnx_ir import tensor_adapters
from torch import Tensor, nn

from .blocks import Blocks, gptq, round_to_nearest
from .errors import ExportError
from .pack import PARTS
from .simplify import CHECKPOINT_NAME, TRANSPOSED

BITS = {"int4": 4, "int8": 8}
METHODS = ("rtn", "gptq")
BLOCKS = (16, 32, 64, 128)
# Set on a value whose tensor is computed from checkpoint weights: a function of them.
COMPUTED = "melt.computed"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_FEWEST_COLUMNS = 16
# Multiplying with activations in 8 bits; without the attribute they stay float32.
ACCURACY = "accuracy_level"
_INT8_ACTIVATIONS = 4


@dataclass(frozen=True)
class WeightOptions:
    """How products are stored. ``kind``: "int4" or "int8"; ``block``: inputs that share a scale; ``head``: of the
    output head, which is read once a token and spoils more than it saves in 4 bits; ``keep``: patterns (``*``) of
    checkpoint names that stay as they are; ``int8``: patterns of those that have 8 bits whatever ``kind`` says, and
    with them what is packed beside them; ``method``: "rtn" (rounded to nearest) or "gptq" (calibrated on
    ``calibration``, a UTF-8 text; None: Python's documentation). Raises ExportError."""

    kind: str
    block: int = 32
    head: str = "int8"
    keep: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()
    method: str = "gptq"
    calibration: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in BITS or self.head not in BITS:
            raise ExportError(f"weights {self.kind!r} are not one of {', '.join(BITS)}")
        if self.method not in METHODS:
            raise ExportError(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        if self.calibration is not None and self.method != "gptq":
            raise ExportError("only the method gptq reads a calibration text")
        if self.block not in BLOCKS:
            raise ExportError(f"block is {self.block}; it must be one of {', '.join(map(str, BLOCKS))}")

    def kept(self, name: str) -> bool:
        """Whether a checkpoint weight stays as it is."""
        return any(fnmatchcase(name, pattern) for pattern in self.keep)

    def record(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {
            "kind": self.kind,
            "block": self.block,
            "head": self.head,
            "method": self.method,
            "keep": list(self.keep),
            "int8": list(self.int8),
            "calibration": self.calibration.name if self.calibration else None,
        }


def check_patterns(options: WeightOptions, weights: Weights) -> None:
    """Raises ExportError for a pattern that matches no weight: it is misspelt."""
    for pattern in (*options.keep, *options.int8):
        if not any(fnmatchcase(name, pattern) for name in (*weights, HEAD)):
            raise ExportError(f"the pattern {pattern!r} matches no weight of the checkpoint")


def quantize_products(model: ir.Model, options: WeightOptions, hessians: Mapping[str, Tensor]) -> int:
    """Turns products with checkpoint weights into MatMulNBits, in place; the numbers are computed when written.

    hessians: by checkpoint name, of the products that are calibrated. Returns how many there are.
    """
    graph, count = model.graph, 0
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None:
            continue
        before = weight.producer()
        tied = before is not None and before.op_type == "Transpose"
        source = before.inputs[0] if before is not None and tied else weight
        name = None if source is None else source.meta.get(CHECKPOINT_NAME)
        if source is None or name is None or source.shape is None or not (tied or source.meta.get(TRANSPOSED)):
            continue
        parts = tuple(source.meta.get(PARTS) or (name,))
        names = (HEAD,) if tied else parts
        inputs, outputs = [int(size) for size in source.shape][:: -1 if tied else 1]  # type: ignore[arg-type]
        if outputs < _FEWEST_COLUMNS or any(options.kept(part) for part in names):
            continue
        _replace(graph, node, parts, str(name), (inputs, outputs), options, hessians)
        count += 1
    unused = [node for node in graph if node.op_type == "Transpose" and not node.outputs[0].uses()]
    graph.remove(unused, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    if count:
        model.opset_imports.setdefault("com.microsoft", 1)
    return count


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    parts: tuple[str, ...],
    name: str,
    size: tuple[int, int],
    options: WeightOptions,
    hessians: Mapping[str, Tensor],
) -> None:
    wide = any(fnmatchcase(part, pattern) for part in parts for pattern in options.int8)
    kind = options.head if name in (HEAD, EMBEDDING) else "int8" if wide else options.kind
    bits, block, (inputs, outputs) = BITS[kind], options.block, size
    count = -(-inputs // block)
    memo: list[Blocks] = []  # the numbers are written just before their scales

    def blocks(weights: Weights, *, last: bool) -> Blocks:
        found = memo.pop() if memo else _quantized(weights, parts, bits, block, hessians)
        if not last:
            memo.append(found)
        return found

    label = HEAD if name == EMBEDDING else name
    stored = (
        ("q", ir.DataType.UINT8, [outputs, count, block * bits // 8], lambda w: blocks(w, last=False).packed()),
        ("scales", ir.DataType.FLOAT, [outputs, count], lambda w: blocks(w, last=True).scales),
    )
    operands = []
    for suffix, dtype, shape, compute in stored:
        value = ir.Value(name=f"{label}.{suffix}", shape=ir.Shape(shape), type=ir.TensorType(dtype))
        value.meta[COMPUTED] = compute
        graph.register_initializer(_hollow(value))
        operands.append(value)
    attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, ACCURACY: _INT8_ACTIVATIONS}
    path = str(node.name).removesuffix("/MatMul").removesuffix("MatMul")
    product = ir.node(
        "MatMulNBits", [node.inputs[0], *operands], attributes, domain="com.microsoft", name=f"{path}/MatMulNBits"
    )
    old, new = node.outputs[0], product.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    graph.insert_before(node, product)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _hollow(value: ir.Value) -> ir.Value:
    """An initializer must have a tensor when it is registered; the real one comes with the weights."""
    assert value.dtype is not None
    assert value.shape is not None
    value.const_value = ir.LazyTensor(
        _unattached,
        dtype=value.dtype,
        shape=value.shape,
        name=value.name,  # type: ignore[arg-type]
    )
    return value


def _unattached() -> ir.TensorProtocol:
    raise AssertionError("the weights were not attached")


def _quantized(
    weights: Weights, parts: tuple[str, ...], bits: int, block: int, hessians: Mapping[str, Tensor]
) -> Blocks:
    """Packed products lie side by side, and each output has blocks of its own."""
    found = []
    for part in parts:
        weight, hessian = weights.tensor(part), hessians.get(HEAD if part == EMBEDDING else part)
        found.append(round_to_nearest(weight, bits, block) if hessian is None else gptq(weight, hessian, bits, block))
    return Blocks(
        torch.cat([part.numbers for part in found]), torch.cat([part.scales for part in found]), bits, found[0].inputs
    )


def halve_embedding(model: ir.Model) -> None:
    """Stores the embedding as float16, widened after the rows are looked up. In place."""
    graph = model.graph
    (node,) = (node for node in graph if node.op_type == "Gather")
    table = node.inputs[0]
    assert table is not None
    half = ir.Value(name=f"{table.name}.fp16", shape=table.shape, type=ir.TensorType(ir.DataType.FLOAT16))
    half.meta[COMPUTED] = lambda weights: _half(weights, str(table.meta[CHECKPOINT_NAME]))
    graph.register_initializer(_hollow(half))
    old = node.outputs[0]
    rows = ir.Value(name="rows", shape=old.shape, type=ir.TensorType(ir.DataType.FLOAT16))
    gather = ir.Node("", "Gather", [half, node.inputs[1]], outputs=[rows], name=node.name)
    wide = ir.Node("", "Cast", [rows], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], num_outputs=1, name="/Cast")
    new = wide.outputs[0]
    new.shape, new.type = old.shape, old.type
    graph.insert_before(node, [gather, wide])
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = old.name
    del graph.initializers[str(table.name)]


def _half(weights: Weights, name: str) -> Tensor:
    half = weights.tensor(name).half()
    if not torch.isfinite(half).all():
        raise ExportError(f"tensor {name} has values beyond fp16's range; export without --weights")
    return half


def computed_tensor(value: ir.Value, weights: Weights) -> ir.TensorProtocol:
    """The tensor of a value marked COMPUTED, made when it is written."""
    compute: Callable[[Weights], Tensor] = value.meta[COMPUTED]

    def read() -> ir.TensorProtocol:
        return tensor_adapters.TorchTensor(compute(weights).contiguous(), name=value.name)

    return ir.LazyTensor(read, dtype=value.dtype, shape=value.shape, name=value.name)  # type: ignore[arg-type]


def dequantized(model: nn.Module, package: Path) -> None:
    """Replaces a PyTorch model's weights by what its quantized package has stored: float32, in place.

    Raises ExportError where a product of the package is none of the model's.
    """
    linear = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for graph in ("loop_step", "lm_head"):
        for node in ir.load(package / f"{graph}.onnx").graph:
            if node.op_type != "MatMulNBits":
                continue
            numbers, scales = (_tensor(node.inputs[at]) for at in (1, 2))
            bits, inputs = (node.attributes[name].as_int() for name in ("bits", "K"))
            values = Blocks.unpacked(numbers, scales, bits, inputs).values()
            for name in part_names(str(node.inputs[1].name).removesuffix(".q"), linear):  # type: ignore[union-attr]
                module = linear[name]
                module.weight = nn.Parameter(values[: module.out_features].clone(), requires_grad=False)
                values = values[module.out_features :]
    table = model.get_submodule(EMBEDDING.removesuffix(".weight"))
    table.weight = nn.Parameter(table.weight.half().float(), requires_grad=False)  # type: ignore[operator, union-attr, arg-type]


def _tensor(value: ir.Value | None) -> Tensor:
    assert value is not None
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy().copy())


def part_names(packed: str, known: Container[str]) -> list[str]:
    """The weights in a packed one, by its name: ``a.k+v.weight`` is ``a.k.weight`` and ``a.v.weight``.

    Raises ExportError where they are not among the known.
    """
    first, *others = packed.removesuffix(".weight").split("+")
    pieces = first.split(".")
    for shared in range(len(pieces)):
        names = [".".join((*pieces[:shared], other, "weight")) for other in (".".join(pieces[shared:]), *others)]
        if all(name in known for name in names):
            return names
    raise ExportError(f"the package stores a product {packed!r} that the checkpoint does not have")
