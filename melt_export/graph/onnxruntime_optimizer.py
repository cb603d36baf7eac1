"""Optimisation of a graph by ONNX Runtime, stored in the package so that loading is fast."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime

from ..errors import ExportError

_EXTENSION = ".optimized"
# The optimiser writes its fused norm into ONNX's domain under a name that ONNX lacks; opset 23 has the same operator.
_NORM, _DEFINED_NORM = "SimplifiedLayerNormalization", "RMSNormalization"


def optimize(path: Path) -> None:
    """Replace a float32 graph by ONNX Runtime's optimised form. The weights stay in their file.

    Leaves out optimisations that depend on the processor, and constant folding, which would write weights into the
    graph. Raises ExportError if ONNX Runtime cannot load the graph.
    """
    written = path.with_name(path.name + _EXTENSION)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(written)
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 3
    try:
        onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"])
    except Exception as error:  # its exceptions have no common base
        raise ExportError(f"ONNX Runtime cannot load {path.name}: {' '.join(str(error).split())}") from error
    plain, model = ir.load(path), ir.load(written)
    written.unlink()
    for node in model.graph.all_nodes():
        if (node.domain, node.op_type) == ("", _NORM):
            node.op_type = _DEFINED_NORM
    model.producer_name, model.producer_version = plain.producer_name, plain.producer_version
    used = {node.domain for node in model.graph.all_nodes()}
    for domain in [domain for domain in model.opset_imports if domain not in used]:
        del model.opset_imports[domain]
    ir.save(model, path)
