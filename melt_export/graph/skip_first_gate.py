"""Skipping of the gate in a token's first loop, where the latent equals the layer's input whatever the gate gives.

The gate has about an eighth of a layer's weights, and reading weights takes most of a decoding step.
"""

from __future__ import annotations

import onnx_ir as ir


def skip_first_gate(graph: ir.Graph) -> None:
    """Move each layer's gate into an If that is skipped while every token is in its first loop, in place.

    Valid if the latent starts as the first input a_1: then h_1 = a_1 + z (a_1 - a_1) = a_1, exactly. The nodes from the
    Where that starts the latent to the Where that freezes it are moved. Must run before ``merge_matmuls``, which merges
    a matmul of the gate with the query's.
    """
    first_loop = next(value for value in graph.inputs if value.name == "first_loop")
    conditions = [node.outputs[0] for node in _users(first_loop, "Unsqueeze")]
    starts = [node for condition in conditions for node in _users(condition, "Where")]
    if not starts:
        return
    all_first = _all(graph, first_loop)
    for start in starts:
        _branch(graph, start, all_first)


def _users(value: ir.Value, kind: str) -> list[ir.Node]:
    return [usage.node for usage in value.uses() if usage.node.op_type == kind]


def _all(graph: ir.Graph, first_loop: ir.Value) -> ir.Value:
    """Return a scalar bool: whether every token is in its first loop."""
    number = ir.node("Cast", [first_loop], {"to": int(ir.DataType.INT32)}, name="/all_first/Cast")
    least = ir.node("ReduceMin", number.outputs, {"keepdims": 0}, name="/all_first/ReduceMin")
    result = ir.node("Cast", least.outputs, {"to": int(ir.DataType.BOOL)}, name="/all_first/Cast_2")
    for node, kind, shape in (
        (number, ir.DataType.INT32, first_loop.shape),
        (least, ir.DataType.INT32, ir.Shape([])),
        (result, ir.DataType.BOOL, ir.Shape([])),
    ):
        value = node.outputs[0]
        value.name, value.type, value.shape = f"{str(node.name)[1:]}.out", ir.TensorType(kind), shape
    graph.insert_before(next(iter(graph)), [number, least, result])
    return result.outputs[0]


def _branch(graph: ir.Graph, start: ir.Node, all_first: ir.Value) -> None:
    """Move one layer's gate, from the Where that starts its latent, into the else branch of an If."""
    layer_input, begun = start.inputs[1], start.outputs[0]
    frozen = next(node for node in _users(begun, "Where") if node.inputs[2] is begun)
    inside = {start, frozen}
    waiting = [frozen.inputs[1]]
    while waiting:
        value = waiting.pop()
        node = None if value is None or value is layer_input else value.producer()
        if node is not None and node not in inside:
            inside.add(node)
            waiting += node.inputs
    moved = [node for node in graph if node in inside]
    assert layer_input is not None

    path, old = str(start.name).rpartition("/")[0], frozen.outputs[0]
    same = ir.node("Identity", [layer_input], name=f"{path}/first_loop/Identity")
    chosen = ir.node("If", [all_first], name=f"{path}/latent_gate/If")
    new = chosen.outputs[0]
    for value, name in ((new, str(old.name)), (same.outputs[0], f"{path[1:]}/first_loop/Identity.out")):
        value.name, value.type, value.shape = name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = f"{path[1:]}/later_loops.out"
    graph.insert_after(frozen, chosen)
    graph.remove(moved)
    for name, nodes in (("then_branch", [same]), ("else_branch", moved)):
        branch = ir.Graph([], nodes[-1].outputs, nodes=nodes, name=f"{path[1:]}/{name}")
        chosen.attributes.add(ir.AttrGraph(name, branch))
