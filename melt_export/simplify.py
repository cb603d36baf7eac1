"""After tracing: weights stored the way they are multiplied, constants folded, and names that explain themselves."""

from __future__ import annotations

import ast
import re
from collections import Counter

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants_ir

# Set on a weight that the file must hold transposed: (out, in) in the checkpoint, (in, out) in the graph.
TRANSPOSED = "melt.transposed"
CHECKPOINT_NAME = "melt.checkpoint_name"
_EMBEDDING = "model.embed_tokens.weight"


def simplify(model: ir.Model) -> None:
    """Cleans up a traced graph in place. Checkpoint weights lose their (empty) data and keep their names."""
    _detach_weights(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    fold_constants_ir(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.IdentityEliminationPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    _name_everything(model.graph)
    passes.ClearMetadataAndDocStringPass()(model)


def _detach_weights(graph: ir.Graph) -> None:
    """Drops weight data, and the Transpose before each product where nothing else reads the weight.

    The embedding stays as it is: the head of a tied checkpoint shares it with the embedding graph.
    """
    for name, value in list(graph.initializers.items()):
        if not name.endswith((".weight", ".bias")):
            continue
        value.const_value = None
        value.meta[CHECKPOINT_NAME] = name
        users = [usage.node for usage in value.uses()]
        if name == _EMBEDDING or not users or any(node.op_type != "Transpose" for node in users):
            continue
        value.meta[TRANSPOSED] = True
        assert value.shape is not None
        value.shape = ir.Shape(list(value.shape)[::-1])
        for node in users:
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)


def _scope(node: ir.Node) -> str:
    """The module path that a node came from, with slashes: ``layers.0.self_attn.q_proj`` -> ``layers/0/...``."""
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    scopes = ast.literal_eval(text) if text else [""]
    path = scopes[-2] if len(scopes) > 1 else ""
    path = "" if path.startswith("_") else path.removeprefix("model.")  # "_": shapes, which belong to no module
    return re.sub(r"\.(?=\D)", "/", path)


def _name_everything(graph: ir.Graph) -> None:
    """Node ``/layers.0/self_attn/q_proj/MatMul``, its output ``layers.0/self_attn/q_proj/MatMul.out``."""
    counts: Counter[str] = Counter()
    kept = {id(value) for value in graph.outputs}
    for node in graph:
        base = "/".join(part for part in (_scope(node), node.op_type) if part)
        counts[base] += 1
        name = base if counts[base] == 1 else f"{base}_{counts[base]}"
        node.name = f"/{name}"
        for index, output in enumerate(node.outputs):
            if id(output) not in kept:
                output.name = f"{name}.out" if index == 0 else f"{name}.out{index}"
    for index, (name, value) in enumerate(list(graph.initializers.items())):
        if CHECKPOINT_NAME not in value.meta and not name.startswith("rotary."):
            value.name = f"constant.{index}"
