"""Weights in 4 or 8 bits: which ones, in which ONNX form.

A weight is split into blocks along its inputs; each block has a scale and whole numbers. ONNX Runtime reads them in one
operator (MatMulNBits) and computes on 8-bit activations, which saves most of the time. In the standard dialect a
DequantizeLinear stands before the matmul, for engines: there 8 bits have one scale per output instead of blocks, and
all scales are positive, because TensorRT reads no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from melt_models.checkpoint import Weights
from onnx_ir import tensor_adapters
from torch import Tensor, nn

from ..errors import ExportError
from ..graph.cleanup import CHECKPOINT_NAME, TRANSPOSED
from ..graph.dialects import DEQUANTIZE, MATMUL_NBITS
from ..graph.external_weights import COMPUTED
from ..graph.merge_matmuls import MERGED, MIN_COLUMNS
from ..reference.pytorch import linear_layers
from .blocks import Blocks, pack_nibbles, round_to_nearest
from .gptq import InverseHessian, gptq
from .options import BITS, Grid, WeightOptions
from .sensitivity import most_sensitive

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Attribute for 8-bit activations; without it they stay float32.
ACCURACY = "accuracy_level"
_INT8_ACTIVATIONS = 4
GATHER_QUANTIZED = "GatherBlockQuantized"
_LEAST_SCALE = 2.0**-16


def check_patterns(options: WeightOptions, weights: Weights) -> None:
    """Raise ExportError for a pattern that matches no weight and is probably misspelt."""
    for pattern in (*options.keep, *options.int8):
        if not _matches((*weights, HEAD), (pattern,)):
            raise ExportError(f"the pattern {pattern!r} matches no weight of the checkpoint")


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


@dataclass(frozen=True)
class Statistics:
    """Statistics of matmuls on a calibration text, by checkpoint name.

    - ``hessians``: of calibrated weights.
    - ``raised``: the weights that get 8 bits because they lose most in 4.
    """

    hessians: Mapping[str, Tensor] = field(default_factory=dict)
    raised: frozenset[str] = frozenset()


def weights_in_more_bits(model: nn.Module, options: WeightOptions, cost: Mapping[str, float]) -> frozenset[str]:
    """Choose the weights of a model that lose most in 4 bits and get 8, within ``int8_share``; by checkpoint name.

    ``cost``: of each in 4 bits, as ``sensitivities`` returns it; empty: none is chosen.
    """
    sizes = {
        name: layer.in_features * layer.out_features // 2  # bytes of 4 more bits
        for name, layer in linear_layers(model).items()
        if layer.out_features >= MIN_COLUMNS
    }
    fixed = (HEAD, EMBEDDING, *options.keep, *options.int8)
    sizes = {name: size for name, size in sizes.items() if name in cost and not _matches((name,), fixed)}
    if BITS[options.kind] != BITS["int4"] or not sizes:
        return frozenset()
    with_scales = 1 + 8 / options.block  # relative size of a block with its float32 scale
    return frozenset(most_sensitive(sizes, cost, options.share * sum(sizes.values()) * with_scales))


def quantize_matmuls(
    model: ir.Model, options: WeightOptions, seen: Statistics, operator: str, dtype: torch.dtype
) -> list[str]:
    """Replace matmuls with checkpoint weights by quantized ones, in place. Weights are quantized when they are written.

    ``operator`` reads them: MATMUL_NBITS or DEQUANTIZE. ``dtype`` is the matmuls' type. Returns the names of the
    matmuls whose weights are ``seen.raised``.
    """
    insert = _nbits if operator == MATMUL_NBITS else _dequantize
    matmuls = list(_matmuls(model.graph, options, seen.hessians))
    labels = []
    for node, matmul in matmuls:
        if seen.raised.issuperset(matmul.parts):
            matmul.bits = 8
            labels.append(matmul.label)
        insert(model.graph, node, matmul, dtype)
    passes.RemoveUnusedNodesPass()(model)
    return sorted(labels)


def _matmuls(
    graph: ir.Graph, options: WeightOptions, hessians: Mapping[str, Tensor]
) -> Iterator[tuple[ir.Node, _QuantizedMatmul]]:
    """Yield the matmuls to quantize, with their nodes."""
    for node in list(graph.all_nodes()):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None:
            continue
        before = weight.producer()
        tied = before is not None and before.op_type == "Transpose"
        source = before.inputs[0] if before is not None and tied else weight
        name = None if source is None else source.meta.get(CHECKPOINT_NAME)
        if source is None or name is None or source.shape is None or not (tied or source.meta.get(TRANSPOSED)):
            continue
        parts = tuple(source.meta.get(MERGED) or (name,))
        names = (HEAD,) if tied else parts
        inputs, outputs = [int(size) for size in source.shape][:: -1 if tied else 1]  # type: ignore[arg-type]
        if outputs < MIN_COLUMNS or _matches(names, options.keep):
            continue
        kind = options.head if name in (HEAD, EMBEDDING) else "int8" if _matches(parts, options.int8) else options.kind
        label = HEAD if name == EMBEDDING else str(name)
        shares = name == EMBEDDING and options.embedding == options.head
        how = options.for_embedding(inputs) if shares else options
        yield node, _QuantizedMatmul(parts, label, inputs, outputs, BITS[kind], how, hessians)


@dataclass
class _QuantizedMatmul:
    """A matmul to quantize: the names of its (merged) weights, its label, and its size."""

    parts: tuple[str, ...]
    label: str
    inputs: int
    outputs: int
    bits: int
    options: WeightOptions
    hessians: Mapping[str, Tensor]

    def values(self, graph: ir.Graph, grid: Grid, stored: Mapping[str, _Stored]) -> list[ir.Value]:
        """Add the initializers of ``stored`` to the graph. They are computed one after the other when they are written.

        Those of the embedding and of a head tied to it are the same bytes where they have as many bits.
        """
        memo: list[Blocks] = []  # kept between the first and the last initializer that is written
        found = []

        def reader(suffix: str) -> Callable[[Weights], Tensor]:
            def read(weights: Weights) -> Tensor:
                blocks = memo.pop() if memo else self._quantized(weights, grid)
                if suffix != list(stored)[-1]:
                    memo.append(blocks)
                return stored[suffix].form(blocks)

            return read

        for suffix, how in stored.items():
            value = ir.Value(name=f"{self.label}.{suffix}", shape=ir.Shape(how.shape), type=ir.TensorType(how.dtype))
            value.meta[COMPUTED] = reader(suffix)
            if self.parts == (EMBEDDING,):
                value.meta[CHECKPOINT_NAME] = f"{EMBEDDING}.{grid.bits}{'a' * grid.asymmetric}.{suffix}"
            graph.initializers[str(value.name)] = value
            found.append(value)
        return found

    def _quantized(self, weights: Weights, grid: Grid) -> Blocks:
        """Quantize the merged weights one by one and stack their outputs."""
        found, inverses = [], dict[int, InverseHessian | None]()
        for part in self.parts:
            weight, hessian = weights.tensor(part), self.hessians.get(HEAD if part == EMBEDDING else part)
            if id(hessian) not in inverses:  # weights with one input share it
                inverses[id(hessian)] = None if hessian is None else InverseHessian.of(hessian)
            inverse = inverses[id(hessian)]
            found.append(round_to_nearest(weight, grid) if inverse is None else gptq(weight, inverse, grid))
        return Blocks.stacked(found)


@dataclass(frozen=True)
class _Stored:
    """Type and shape of an initializer, and the function that makes it from Blocks."""

    dtype: ir.DataType
    shape: tuple[int, ...]
    form: Callable[[Blocks], Tensor]


def _nbits(graph: ir.Graph, node: ir.Node, matmul: _QuantizedMatmul, dtype: torch.dtype) -> None:
    """Replace a MatMul by a MatMulNBits."""
    grid = matmul.options.grid(matmul.bits)
    bits, block, count = grid.bits, grid.block, -(-matmul.inputs // grid.block)
    stored = {
        "q": _Stored(ir.DataType.UINT8, (matmul.outputs, count, block * bits // 8), Blocks.packed),
        "scales": _Stored(ir.DataType.FLOAT, (matmul.outputs, count), lambda blocks: blocks.scales),
    }
    if grid.asymmetric:
        stored["zeros"] = _Stored(ir.DataType.UINT8, (matmul.outputs, -(-count * bits // 8)), Blocks.packed_zeros)
    operands = matmul.values(graph, grid, stored)
    attributes = {"K": matmul.inputs, "N": matmul.outputs, "bits": bits, "block_size": block}
    if matmul.options.activations == "int8":
        attributes[ACCURACY] = _INT8_ACTIVATIONS
    path = str(node.name).removesuffix("/MatMul").removesuffix("MatMul")
    made = ir.node(
        MATMUL_NBITS, [node.inputs[0], *operands], attributes, domain="com.microsoft", name=f"{path}/MatMulNBits"
    )
    old, new = node.outputs[0], made.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    graph.opset_imports.setdefault(made.domain, 1)
    _own_graph(node).insert_before(node, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    _own_graph(node).remove(node, safe=True)


def _dequantize(graph: ir.Graph, node: ir.Node, matmul: _QuantizedMatmul, dtype: torch.dtype) -> None:
    """Insert a DequantizeLinear before a MatMul. If blocks do not fit, 8 bits with one scale per output are used."""
    block = matmul.options.block
    if matmul.inputs % block or matmul.outputs % 2:
        matmul.bits = 8
    blocked = matmul.bits == 4
    block = block if blocked else matmul.inputs
    numbers = ir.DataType.INT4 if blocked else ir.DataType.INT8
    scales = (matmul.inputs // block, matmul.outputs) if blocked else (matmul.outputs,)
    kind = tensor_adapters.from_torch_dtype(dtype)
    stored = {
        "q": _Stored(numbers, (matmul.inputs, matmul.outputs), _signed),
        "scales": _Stored(kind, scales, lambda blocks: _scales(blocks, dtype).reshape(scales)),
    }
    operands = matmul.values(graph, Grid(matmul.bits, block, positive=True), stored)
    attributes = {"axis": 0, "block_size": block} if blocked else {"axis": 1}
    made = ir.node(DEQUANTIZE, operands, attributes, name=f"{str(node.name).removesuffix('/MatMul')}/DequantizeLinear")
    new = made.outputs[0]
    new.name, new.shape, new.type = (
        f"{matmul.label}.wide",
        ir.Shape((matmul.inputs, matmul.outputs)),
        ir.TensorType(kind),
    )
    _own_graph(node).insert_before(node, made)
    node.replace_input_with(1, new)


def _own_graph(node: ir.Node) -> ir.Graph:
    """Return the graph, or the branch of an If, that contains a node."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _signed(blocks: Blocks) -> Tensor:
    """Return the numbers as int8 (inputs, outputs), or in 4 bits as (inputs, outputs / 2), the first of two in the
    lower half."""
    numbers = (blocks.numbers.flatten(1).t().to(torch.int16) - (1 << (blocks.bits - 1))).to(torch.int8).contiguous()
    if blocks.bits == 8:
        return numbers
    return pack_nibbles(numbers.view(torch.uint8) & 15)


def _scales(blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """Return the scales to store, (blocks, outputs), never zero even in float16."""
    return blocks.scales.t().clamp(min=_LEAST_SCALE).to(dtype)


def halve_embedding(model: ir.Model) -> None:
    """Store the embedding as float16 and widen it after the lookup. In place."""
    lookup, table = _embedding_lookup(model.graph)
    half = ir.Value(name=f"{table.name}.fp16", shape=table.shape, type=ir.TensorType(ir.DataType.FLOAT16))
    half.meta[COMPUTED] = lambda weights: _half(weights, str(table.meta[CHECKPOINT_NAME]))
    model.graph.initializers[str(half.name)] = half
    rows = ir.Value(name="rows", shape=lookup.outputs[0].shape, type=ir.TensorType(ir.DataType.FLOAT16))
    gather = ir.Node("", "Gather", [half, lookup.inputs[1]], outputs=[rows], name=lookup.name)
    taken = any(node.name == "/Cast" for node in model.graph)  # in a graph with a prelude
    name = f"{lookup.name}/Cast" if taken else "/Cast"
    wide = ir.Node("", "Cast", [rows], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], num_outputs=1, name=name)
    _replace_lookup(model.graph, lookup, [gather, wide])


def quantize_embedding(model: ir.Model, options: WeightOptions, seen: Statistics, *, tied: bool) -> None:
    """Store the embedding in blocks of few bits and widen its rows in the lookup. In place.

    Raises ExportError if a row is not a whole number of blocks of any size.
    """
    lookup, table = _embedding_lookup(model.graph)
    assert table.shape is not None
    assert options.embedding is not None
    rows, width = (int(size) for size in table.shape)  # type: ignore[arg-type]
    fitting = options.for_embedding(width)
    grid = replace(fitting.grid(BITS[options.embedding]), asymmetric=False)
    as_head = tied and options.embedding == options.head and fitting.grid(grid.bits) == grid
    hessians = seen.hessians if as_head else {}
    weight = _QuantizedMatmul((EMBEDDING,), EMBEDDING, width, rows, grid.bits, fitting, hessians)
    stored = {
        "q": _Stored(ir.DataType.UINT8, (rows, width * grid.bits // 8), lambda blocks: blocks.packed().flatten(1)),
        "scales": _Stored(ir.DataType.FLOAT, (rows, width // grid.block), lambda blocks: blocks.scales),
    }
    numbers, scales = weight.values(model.graph, grid, stored)
    attributes = {"bits": grid.bits, "block_size": grid.block, "gather_axis": 0, "quantize_axis": 1}
    name = str(lookup.name).replace("Gather", GATHER_QUANTIZED)
    operands = [numbers, lookup.inputs[1], scales]
    made = ir.node(GATHER_QUANTIZED, operands, attributes, domain="com.microsoft", name=name)
    model.graph.opset_imports.setdefault(made.domain, 1)
    _replace_lookup(model.graph, lookup, [made])


def _embedding_lookup(graph: ir.Graph) -> tuple[ir.Node, ir.Value]:
    """Return the node that looks token ids up, and the table that it reads."""
    for node in graph:
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is not None and table.meta.get(CHECKPOINT_NAME) == EMBEDDING:
            return node, table
    raise AssertionError("the graph looks no token up")


def _replace_lookup(graph: ir.Graph, lookup: ir.Node, made: list[ir.Node]) -> None:
    """Replace the lookup by other nodes, the last of which gives its output, and drop its table."""
    old, new, table = lookup.outputs[0], made[-1].outputs[0], lookup.inputs[0]
    assert table is not None
    new.shape, new.type = old.shape, old.type
    graph.insert_before(lookup, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(lookup, safe=True)
    new.name = old.name
    del graph.initializers[str(table.name)]


def _half(weights: Weights, name: str) -> Tensor:
    half = weights.tensor(name).half()
    if not torch.isfinite(half).all():
        raise ExportError(f"tensor {name} has values beyond fp16's range; export without --weights")
    return half
