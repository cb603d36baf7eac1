"""A token's first loop without the gate: its latent is then the layer's input, whatever the gate would say.

The gate has about an eighth of a layer's weights, and a step at decode is little more than reading weights.
"""

from __future__ import annotations

import onnx_ir as ir


def skip_first_gate(graph: ir.Graph) -> None:
    """Puts each layer's gate behind an If that is not taken while every sequence is in its first loop, in place.

    For a latent that starts as the first input, a_1: then h_1 = a_1 + z (a_1 - a_1) = a_1, to the last bit. What is
    moved is all that lies between the Where that starts the latent and the Where that freezes it. Products must not be
    packed yet: one of the gate's shares its input with the query's.
    """
    first_loop = next(value for value in graph.inputs if value.name == "first_loop")
    columns = [node.outputs[0] for node in _users(first_loop, "Unsqueeze")]
    conditions = [node.outputs[0] for column in columns for node in _users(column, "Unsqueeze")]
    starts = [node for condition in conditions for node in _users(condition, "Where")]
    if not starts:
        return
    all_first = _all(graph, first_loop)
    for start in starts:
        _branch(graph, start, all_first)


def _users(value: ir.Value, kind: str) -> list[ir.Node]:
    return [usage.node for usage in value.uses() if usage.node.op_type == kind]


def _all(graph: ir.Graph, first_loop: ir.Value) -> ir.Value:
    """Whether every sequence is in its first loop: a bool without dimensions."""
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
    """Moves one layer's gate, from the Where that starts its latent, into the second branch of an If."""
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
