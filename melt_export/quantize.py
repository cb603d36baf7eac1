"""Weights stored in 4 or 8 bits for ONNX Runtime: which products, in what form, and what the stored numbers mean.

A weight is cut into blocks along its inputs; each block has one float32 scale, and whole numbers beside it
(MatMulNBits). Products compute on activations in 8 bits, which is where most of the time is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import onnx_ir as ir
import torch
from melt_models.checkpoint import Weights
from onnx_ir import tensor_adapters
from torch import Tensor, nn

from .errors import ExportError
from .pack import PARTS
from .simplify import CHECKPOINT_NAME, TRANSPOSED

BITS = {"int4": 4, "int8": 8}
BLOCKS = (16, 32, 64, 128)
# Set on a value whose tensor is computed from checkpoint weights: a function of them.
COMPUTED = "melt.computed"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_FEWEST_COLUMNS = 16
# Shares of a block's largest value that a scale may stand for: rounding errs less when it clips a little.
_SHRINK = tuple(1 - step / 50 for step in range(15))
# Multiplying with activations in 8 bits; without the attribute they stay float32.
ACCURACY = "accuracy_level"
_INT8_ACTIVATIONS = 4
_ROWS_AT_ONCE = 1 << 24  # elements of a weight that are quantized at a time


@dataclass(frozen=True)
class WeightOptions:
    """How products are stored. ``kind``: "int4" or "int8"; ``block``: inputs that share a scale; ``head``: of the
    output head, which is read once a token and spoils more than it saves in 4 bits; ``keep``: patterns (``*``) of
    checkpoint names that stay as they are. Raises ExportError."""

    kind: str
    block: int = 32
    head: str = "int8"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in BITS or self.head not in BITS:
            raise ExportError(f"weights {self.kind!r} are not one of {', '.join(BITS)}")
        if self.block not in BLOCKS:
            raise ExportError(f"block is {self.block}; it must be one of {', '.join(map(str, BLOCKS))}")

    def kept(self, name: str) -> bool:
        """Whether a checkpoint weight stays as it is."""
        return any(fnmatchcase(name, pattern) for pattern in self.keep)

    def record(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {**asdict(self), "method": "rtn", "keep": list(self.keep)}

    @classmethod
    def of(cls, record: dict[str, Any]) -> WeightOptions:
        """The options that a manifest's record came from. Raises ExportError."""
        try:
            return cls(record["kind"], record["block"], record["head"], tuple(record["keep"]))
        except (KeyError, TypeError) as error:
            raise ExportError(f"the manifest's record of quantized weights lacks {error}") from error


@dataclass(frozen=True)
class Blocks:
    """A weight (outputs, inputs): ``numbers`` uint8 (outputs, blocks, block) from 0 to 2 ** bits - 1, of which
    2 ** (bits - 1) means zero; ``scales`` float32 (outputs, blocks). The last block is padded with zeros."""

    numbers: Tensor
    scales: Tensor
    bits: int
    inputs: int

    def values(self) -> Tensor:
        """What the weight is multiplied as: float32 (outputs, inputs)."""
        wide = (self.numbers.float() - (1 << (self.bits - 1))) * self.scales[..., None]
        return wide.flatten(1)[:, : self.inputs]

    def packed(self) -> Tensor:
        """The numbers as MatMulNBits reads them: uint8 (outputs, blocks, block * bits / 8), low bits first."""
        if self.bits == 8:
            return self.numbers
        return self.numbers[..., ::2] | (self.numbers[..., 1::2] << 4)


def round_to_nearest(weight: Tensor, bits: int, block: int) -> Blocks:
    """Quantizes a weight (outputs, inputs), each block with the scale, of a few, that errs least in the square."""
    outputs, inputs = weight.shape
    count = -(-inputs // block)
    numbers = torch.empty(outputs, count, block, dtype=torch.uint8)
    scales = torch.empty(outputs, count)
    step = max(1, _ROWS_AT_ONCE // max(inputs, 1))
    for at in range(0, outputs, step):
        rows = weight[at : at + step].float()
        rows = nn.functional.pad(rows, (0, count * block - inputs)).unflatten(1, (count, block))
        numbers[at : at + step], scales[at : at + step] = _best(rows, bits)
    return Blocks(numbers, scales, bits, inputs)


def _best(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Numbers and scales of blocks (..., block). The largest value goes to the side that has one number more."""
    zero = 1 << (bits - 1)
    extreme = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    best_error = torch.full_like(extreme, float("inf"))
    best_scale = torch.ones_like(extreme)
    for shrink in _SHRINK if bits == 4 else (1.0,):
        scale = extreme * (shrink / -zero)
        scale = torch.where(scale == 0, 1.0, scale)
        error = (_rounded(rows, scale, zero) * scale - rows).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
    return (_rounded(rows, best_scale, zero) + zero).to(torch.uint8), best_scale.squeeze(-1)


def _rounded(rows: Tensor, scale: Tensor, zero: int) -> Tensor:
    return (rows / scale).round().clamp(-zero, zero - 1)


def check_patterns(options: WeightOptions, weights: Weights) -> None:
    """Raises ExportError for a pattern that matches no weight: it is misspelt."""
    for pattern in options.keep:
        if not any(fnmatchcase(name, pattern) for name in (*weights, HEAD)):
            raise ExportError(f"--keep {pattern!r} matches no weight of the checkpoint")


def quantize_products(model: ir.Model, options: WeightOptions) -> int:
    """Turns products with checkpoint weights into MatMulNBits, in place; the numbers are computed when written.

    Returns how many.
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
        _replace(graph, node, parts, str(name), (inputs, outputs), options)
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
    graph: ir.Graph, node: ir.Node, parts: tuple[str, ...], name: str, size: tuple[int, int], options: WeightOptions
) -> None:
    kind = options.head if name in (HEAD, EMBEDDING) else options.kind
    bits, block, (inputs, outputs) = BITS[kind], options.block, size
    count = -(-inputs // block)
    memo: list[Blocks] = []  # the numbers are written just before their scales

    def blocks(weights: Weights, *, last: bool) -> Blocks:
        found = memo.pop() if memo else _quantized(weights, parts, bits, block)
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


def _quantized(weights: Weights, parts: tuple[str, ...], bits: int, block: int) -> Blocks:
    """Packed products lie side by side, and each output has blocks of its own."""
    found = [round_to_nearest(weights.tensor(part), bits, block) for part in parts]
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


def dequantized(model: nn.Module, options: WeightOptions) -> None:
    """Replaces a PyTorch model's weights by what its quantized package multiplies with: float32, in place."""
    with torch.no_grad():
        for module_name, module in model.named_modules():
            name = f"{module_name}.weight"
            if not isinstance(module, nn.Linear) or module.out_features < _FEWEST_COLUMNS or options.kept(name):
                continue
            bits = BITS[options.head if name == HEAD else options.kind]
            module.weight = nn.Parameter(round_to_nearest(module.weight, bits, options.block).values())
        table = model.get_submodule(EMBEDDING.removesuffix(".weight"))
        table.weight = nn.Parameter(table.weight.half().float())  # type: ignore[operator, union-attr, arg-type]
