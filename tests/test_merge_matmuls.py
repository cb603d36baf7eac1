"""Matmuls that read the same input are merged in a package for ONNX Runtime, and only there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_models.checkpoint import Weights

from melt_export.graph.merge_matmuls import merged_name
from melt_export.parity.verify import verify

LAYER = "model.layers.0."
PACKED = {
    LAYER + "self_attn.k_proj+v_proj.weight": ("self_attn.k_proj", "self_attn.v_proj"),
    LAYER + "mlp.gate_proj+up_proj.weight": ("mlp.gate_proj", "mlp.up_proj"),
}


def initializers(package: Path) -> dict[str, np.ndarray]:
    """The weights of the loop step, by name."""
    graph = onnx.load(package / "loop_step.onnx").graph
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


def operators(package: Path) -> Counter[str]:
    graph = onnx.load(package / "loop_step.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def test_a_layer_has_five_products_instead_of_seven_beside_its_gates(tiny_package: Path) -> None:
    assert operators(tiny_package)["MatMul"] == 2 * 5 + 1  # two layers and the exit gate


def test_a_gate_that_no_loop_skips_shares_a_product_with_the_query(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    package = make_package(make_checkpoint(latent_init="zeros"))
    assert operators(package)["MatMul"] == 2 * 6 + 1
    assert LAYER + "latent_gate.input_proj+self_attn.q_proj.weight" in initializers(package)


def test_packed_weights_hold_the_checkpoints_columns_side_by_side(tiny_package: Path, tiny_checkpoint: Path) -> None:
    stored, weights = initializers(tiny_package), Weights(tiny_checkpoint)
    for name, parts in PACKED.items():
        columns = [weights.tensor(f"{LAYER}{part}.weight").numpy().T for part in parts]
        np.testing.assert_array_equal(stored[name], np.concatenate(columns, axis=1))
        assert not {f"{LAYER}{part}.weight" for part in parts} & set(stored)


@pytest.mark.parametrize("dialect", ["standard", "portable"])
def test_the_other_dialects_keep_a_weight_a_product(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, dialect: str
) -> None:
    package = make_package(make_checkpoint(), dialect=dialect)
    names = set(initializers(package))
    assert f"{LAYER}self_attn.k_proj.weight" in names
    assert not any("+" in name for name in names)


def test_a_gate_of_one_column_stays_alone_and_the_package_agrees(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    checkpoint = make_checkpoint(aggregation="scalar_gate", latent_init="zeros", num_hidden_layers=1)
    package = make_package(checkpoint)
    assert f"{LAYER}latent_gate.input_proj.weight" in initializers(package)
    assert operators(package)["MatMul"] == 7 + 1
    assert verify(package, checkpoint, tokens=8).failures() == []


def test_a_packed_name_shows_what_differs() -> None:
    assert merged_name(["a.k.weight", "a.v.weight"]) == "a.k+v.weight"
    assert merged_name(["a.b.k.weight", "a.c.weight"]) == "a.b.k+c.weight"
    assert merged_name(["a.k", "a.v"]) == "a.k+v"
