"""Merging of matmuls that read the same input into one larger matmul, whose result is split.

Decoding multiplies one token by every weight. Each matmul starts and joins threads, so one large matmul reads more
bytes per second than two small ones.
"""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from ..errors import ExportError
from .cleanup import CHECKPOINT_NAME, TRANSPOSED

# On a merged weight: its names in the checkpoint, in the order of its columns.
MERGED = "melt.merged"
# A narrower weight, such as a gate of one column, would spoil the alignment of the weights it is merged with.
MIN_COLUMNS = 16


def merge_matmuls(graph: ir.Graph, apart: Container[str] = ()) -> None:
    """Merge matmuls of one value with several checkpoint weights, in place and in the graph's order.

    The gate's input projection with query, key with value, gate_proj with up_proj (and query, key and value where they
    read the same value). Each column keeps its arithmetic. Weights must be named and without data.
    ``apart``: weights, by checkpoint name, that are merged with none but each other.
    """
    together: dict[tuple[ir.Value | None, bool], list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "MatMul" and _mergeable(node.inputs[1]):
            name = node.inputs[1].meta[CHECKPOINT_NAME]  # type: ignore[union-attr]
            together.setdefault((node.inputs[0], name in apart), []).append(node)
    for nodes in together.values():
        if len(nodes) > 1:
            _merge(graph, nodes)


def attend_merged(graph: ir.Graph) -> None:
    """Pass merged query, key and value to GroupQueryAttention as one input, which it splits itself. In place."""
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


def _mergeable(weight: ir.Value | None) -> bool:
    """Return whether a matmul's second operand is a checkpoint weight, stored (in, out), that nothing else uses."""
    if weight is None or not weight.meta.get(TRANSPOSED) or len(weight.uses()) != 1 or weight.shape is None:
        return False
    return int(weight.shape[1]) >= MIN_COLUMNS  # type: ignore[arg-type]


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    weights = [weight for node in nodes if (weight := node.inputs[1]) is not None]
    names = [str(weight.meta[CHECKPOINT_NAME]) for weight in weights]
    inputs, columns = int(weights[0].shape[0]), [int(weight.shape[1]) for weight in weights]  # type: ignore[index, arg-type]

    merged = ir.Value(name=merged_name(names), shape=ir.Shape([inputs, sum(columns)]), type=weights[0].type)
    merged.meta.update({CHECKPOINT_NAME: merged.name, TRANSPOSED: True, MERGED: tuple(names)})
    path = merged_name([str(node.name).removesuffix("/MatMul").replace(".", "\0").replace("/", ".") for node in nodes])
    path = path.replace(".", "/").replace("\0", ".")
    matmul = ir.node("MatMul", [nodes[0].inputs[0], merged], name=f"{path}/MatMul")
    result = matmul.outputs[0]
    result.name, result.type = f"{path[1:]}/MatMul.out", nodes[0].outputs[0].type
    whole = nodes[0].outputs[0].shape
    result.shape = None if whole is None else ir.Shape([*list(whole)[:-1], sum(columns)])

    sizes = ir.Value(name=f"{path[1:]}/columns", const_value=ir.tensor(columns, dtype=ir.DataType.INT64))
    sizes.type, sizes.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(columns)])
    split = ir.node("Split", [result, sizes], {"axis": -1}, num_outputs=len(nodes), name=f"{path}/Split")
    for name, value in ((merged.name, merged), (sizes.name, sizes)):
        graph.initializers[str(name)] = value

    graph.insert_before(next(node for node in graph if node in nodes), [matmul, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        part.name, part.shape, part.type = old.name, old.shape, old.type
        old.replace_all_uses_with(part)
        graph.remove(node, safe=True)
    for weight in weights:
        graph.initializers.pop(str(weight.name))


def merged_name(names: list[str]) -> str:
    """Name a merged weight, with the differing parts side by side: a.k.weight and a.v.weight become "a.k+v.weight"."""
    parts = [name.split(".") for name in names]
    front = _agreeing(parts)
    back = _agreeing([part[front:][::-1] for part in parts])
    end = -back or None
    middle = "+".join(".".join(part[front:end]) for part in parts)
    return ".".join([*parts[0][:front], middle, *(parts[0][end:] if end else [])])


def names_in(merged: str, known: Container[str]) -> list[str]:
    """Return the names of the weights in a merged one: "a.k+v.weight" is a.k.weight and a.v.weight.

    Raises ExportError for a name that is not among the ``known``.
    """
    first, *others = merged.removesuffix(".weight").split("+")
    words = first.split(".")
    for shared in range(len(words)):
        names = [".".join((*words[:shared], other, "weight")) for other in (".".join(words[shared:]), *others)]
        if all(name in known for name in names):
            return names
    raise ExportError(f"the package stores a weight {merged!r} that the checkpoint does not have")


def _agreeing(lists: list[list[str]]) -> int:
    """Return how many entries the lists have in common at their beginning."""
    return next(
        (i for i, entries in enumerate(zip(*lists, strict=False)) if len(set(entries)) > 1), min(map(len, lists))
    )
