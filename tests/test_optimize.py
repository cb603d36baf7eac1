"""The loop step that a package keeps: what ONNX Runtime's optimiser leaves, which computes what was traced."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import Runtime

import melt_export.export as road
from melt_export.errors import ExportError
from melt_export.export import build_package
from melt_export.graph.onnxruntime_optimizer import optimize
from melt_export.options import ExportOptions
from melt_export.quantization.options import WeightOptions


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def test_loading_a_package_finds_nothing_to_optimise(tiny_package: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "again.onnx")
    onnxruntime.InferenceSession(tiny_package / "loop_step.onnx", options, ["CPUExecutionProvider"])
    assert kinds(tmp_path / "again.onnx") == kinds(tiny_package / "loop_step.onnx")


@pytest.mark.parametrize("weights", [None, WeightOptions("int4", method="rtn")])
def test_the_optimised_loop_step_gives_the_same_logits(
    weights: WeightOptions | None, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = []
    for name in ("optimised", "traced"):
        (made := tmp_path / name).mkdir()
        build_package(tiny_checkpoint, made, ExportOptions(weights=weights))
        session = Runtime.load(made).session(loops=3)
        session.append([1, 5, 9])
        logits.append(session.logits())
        monkeypatch.setattr(road, "optimize", lambda path: None)
    assert len(kinds(tmp_path / "optimised" / "loop_step.onnx")) < len(kinds(tmp_path / "traced" / "loop_step.onnx"))
    np.testing.assert_array_equal(*logits)


def test_weights_stay_outside_the_graph_and_nothing_is_left_beside_it(tiny_package: Path) -> None:
    graph = onnx.load(tiny_package / "loop_step.onnx", load_external_data=False).graph
    inside = [tensor.name for tensor in graph.initializer if len(tensor.raw_data) >= 4096]
    assert not inside
    assert {path.suffix for path in tiny_package.iterdir()} <= {".onnx", ".data", ".json", ".jinja"}


def test_what_is_not_float32_is_kept_as_it_was_traced(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    """ONNX Runtime would write the casts of its CPU kernels into it."""
    assert kinds(make_package(make_checkpoint(), precision="fp16") / "loop_step.onnx")["ReduceMean"]


def test_a_graph_that_onnx_runtime_cannot_load_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Unknown", ["x"], ["y"], domain="com.microsoft")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "graph", value[:1], value[1:])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path := tmp_path / "step.onnx")
    before = path.read_bytes()
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot load step\.onnx: "):
        optimize(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
