"""Names of nodes and values, and metadata of values in a graph that is not yet written."""

from __future__ import annotations

import re
from collections import Counter

import onnx_ir as ir

# Marks a weight that the file holds transposed: (out, in) in the checkpoint, (in, out) in the graph.
TRANSPOSED = "melt.transposed"
CHECKPOINT_NAME = "melt.checkpoint_name"
# On a node: the module that it came from, as in ``layers.0.self_attn.q_proj``.
SCOPE = "melt.scope"


def name_everything(graph: ir.Graph) -> None:
    """Name nodes by module and operator, and values by node.

    For example node ``/layers.0/self_attn/q_proj/MatMul`` and its output ``layers.0/self_attn/q_proj/MatMul.out``.
    """
    counts: Counter[str] = Counter()
    kept = {id(value) for value in graph.outputs}
    for node in graph:
        scope = re.sub(r"\.(?=\D)", "/", str(node.meta.get(SCOPE, "")))
        base = "/".join(part for part in (scope, node.op_type) if part)
        counts[base] += 1
        name = base if counts[base] == 1 else f"{base}_{counts[base]}"
        node.name = f"/{name}"
        for index, output in enumerate(node.outputs):
            if id(output) not in kept:
                output.name = f"{name}.out" if index == 0 else f"{name}.out{index}"
