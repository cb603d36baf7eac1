"""Fewer, larger products: those that read the same input become one, whose result is split.

A decoding step multiplies one token with every weight; each product is a call of its own that starts and joins the
threads, so one large product moves more bytes a second than two small ones.
"""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from ..errors import ExportError
from .cleanup import CHECKPOINT_NAME, TRANSPOSED

# Set on a packed weight: the checkpoint's names, in the order of its columns.
PARTS = "melt.parts"
# A gate of one column would only spoil the alignment of what it joins.
FEWEST_COLUMNS = 16


def merge_matmuls(graph: ir.Graph) -> None:
    """Joins products of one value with several checkpoint weights, in place and in the graph's order.

    The gate's product of the input with the query, key with value, gate_proj with up_proj (and query, key and value
    where they read the same). The arithmetic of each column stays what it was. Weights must be detached and named
    already.
    """
    together: dict[ir.Value | None, list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "MatMul" and _packable(node.inputs[1]):
            together.setdefault(node.inputs[0], []).append(node)
    for nodes in together.values():
        if len(nodes) > 1:
            _pack(graph, nodes)


def attend_merged(graph: ir.Graph) -> None:
    """Gives each GroupQueryAttention query, key and value side by side where one product made them, in place: the
    operator finds them there by itself, and nothing is split."""
    for attention in [node for node in graph if node.op_type == "GroupQueryAttention"]:
        first = attention.inputs[0]
        split = None if first is None else first.producer()
        if split is None or split.op_type != "Split" or tuple(attention.inputs[:3]) != tuple(split.outputs):
            continue
        if any(len(part.uses()) != 1 for part in split.outputs):
            continue
        attention.replace_input_with(0, split.inputs[0])
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
        graph.remove(split, safe=True)


def _packable(weight: ir.Value | None) -> bool:
    """Whether a product's second operand is a checkpoint weight of its own, stored (in, out)."""
    if weight is None or not weight.meta.get(TRANSPOSED) or len(weight.uses()) != 1 or weight.shape is None:
        return False
    return int(weight.shape[1]) >= FEWEST_COLUMNS  # type: ignore[arg-type]


def _pack(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    weights = [weight for node in nodes if (weight := node.inputs[1]) is not None]
    names = [str(weight.meta[CHECKPOINT_NAME]) for weight in weights]
    inputs, columns = int(weights[0].shape[0]), [int(weight.shape[1]) for weight in weights]  # type: ignore[index, arg-type]

    packed = ir.Value(name=packed_name(names), shape=ir.Shape([inputs, sum(columns)]), type=weights[0].type)
    packed.meta.update({CHECKPOINT_NAME: packed.name, TRANSPOSED: True, PARTS: tuple(names)})
    path = packed_name([str(node.name).removesuffix("/MatMul").replace(".", "\0").replace("/", ".") for node in nodes])
    path = path.replace(".", "/").replace("\0", ".")
    product = ir.node("MatMul", [nodes[0].inputs[0], packed], name=f"{path}/MatMul")
    result = product.outputs[0]
    result.name, result.type = f"{path[1:]}/MatMul.out", nodes[0].outputs[0].type
    whole = nodes[0].outputs[0].shape
    result.shape = None if whole is None else ir.Shape([*list(whole)[:-1], sum(columns)])

    sizes = ir.Value(name=f"{path[1:]}/columns", const_value=ir.tensor(columns, dtype=ir.DataType.INT64))
    sizes.type, sizes.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(columns)])
    split = ir.node("Split", [result, sizes], {"axis": -1}, num_outputs=len(nodes), name=f"{path}/Split")
    for name, value in ((packed.name, packed), (sizes.name, sizes)):
        graph.initializers[str(name)] = value

    graph.insert_before(next(node for node in graph if node in nodes), [product, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        part.name, part.shape, part.type = old.name, old.shape, old.type
        old.replace_all_uses_with(part)
        graph.remove(node, safe=True)
    for weight in weights:
        graph.initializers.pop(str(weight.name))


def packed_name(names: list[str]) -> str:
    """ "a.b.k.weight", "a.b.v.weight" -> "a.b.k+v.weight": what differs stands side by side."""
    parts = [name.split(".") for name in names]
    front = _agreeing(parts)
    back = _agreeing([part[front:][::-1] for part in parts])
    end = -back or None
    middle = "+".join(".".join(part[front:end]) for part in parts)
    return ".".join([*parts[0][:front], middle, *(parts[0][end:] if end else [])])


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


def _agreeing(lists: list[list[str]]) -> int:
    """How many entries the lists have in common at their beginning."""
    return next(
        (i for i, entries in enumerate(zip(*lists, strict=False)) if len(set(entries)) > 1), min(map(len, lists))
    )
