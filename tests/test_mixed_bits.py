"""Where more bits go than were asked for: zero points of blocks, and 8 bits for the products that need them most."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltConfig, MeltForCausalLM

from melt_export.checkpoint import Checkpoint
from melt_export.errors import ExportError
from melt_export.export import building
from melt_export.options import ExportOptions
from melt_export.parity.report import Limits
from melt_export.parity.verify import verify
from melt_export.quantization.blocks import Blocks, round_to_nearest, rounding_error
from melt_export.quantization.gptq import InverseHessian, gptq
from melt_export.quantization.options import Grid, WeightOptions
from melt_export.quantization.sensitivity import most_sensitive, sensitivities

TOKENS = [[token % 60 for token in range(start, start + 20)] for start in range(8)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A MELT and a LoopLM."""
    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("mixed")
    MeltForCausalLM(MeltConfig(**TINY)).save_pretrained(root / "melt")
    fields = {name: value for name, value in TINY.items() if name in LoopLMConfig().to_dict()}
    LoopLMForCausalLM(LoopLMConfig(**fields)).save_pretrained(root / "looplm")
    return {"melt": root / "melt", "looplm": root / "looplm"}


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for small models, and soon over."""
    monkeypatch.setattr("melt_export.quantization.calibration._SEQUENCES", 4)


def export(checkpoint: Path, output: Path, weights: WeightOptions) -> Path:
    """A package that was not verified."""
    with building(checkpoint, output, ExportOptions(max_batch=2, weights=weights)):
        pass
    return output


def bits_of(package: Path) -> dict[str, int]:
    """Of each product in the loop step, by its weight's name."""
    nodes = onnx.load(package / "loop_step.onnx", load_external_data=False).graph.node
    return {
        node.input[1].removesuffix(".q"): next(a.i for a in node.attribute if a.name == "bits")
        for node in nodes
        if node.op_type == "MatMulNBits"
    }


@given(st.integers(1, 9), st.integers(1, 150), st.sampled_from([4, 8]), st.sampled_from([16, 32]), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_zero_points_survive_packing(outputs: int, inputs: int, bits: int, block: int, seed: int) -> None:
    weight = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) - 0.2
    found = round_to_nearest(weight, Grid(bits, block, asymmetric=True))
    again = Blocks.unpacked(found.packed(), found.scales, bits, inputs, found.packed_zeros())
    assert torch.equal(again.values(), found.values())
    assert not found.values()[weight == 0].any()


@pytest.mark.parametrize("calibrated", [False, True])
def test_zero_points_err_less_where_weights_lean_to_one_side(calibrated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(16, 64, generator=generator) - 0.1
    inputs = torch.randn(500, 64, generator=generator)
    inverse = InverseHessian.of(inputs.t() @ inputs)
    errors = []
    for asymmetric in (False, True):
        grid = Grid(4, 32, asymmetric=asymmetric)
        found = gptq(weight, inverse, grid) if calibrated else round_to_nearest(weight, grid)
        errors.append((inputs @ (found.values() - weight).t()).square().mean())
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("name", ["melt", "looplm"])
@pytest.mark.parametrize(
    "options",
    [
        WeightOptions("int4", method="rtn", block=16, asymmetric=True),
        WeightOptions("int4", int8_share=0.3, asymmetric=True),
    ],
)
def test_a_package_with_zero_points_computes_with_its_numbers(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, options: WeightOptions
) -> None:
    package = export(checkpoints[name], tmp_path / "package", options)
    nodes = onnx.load(package / "loop_step.onnx", load_external_data=False).graph.node
    inputs = {len(node.input) for node in nodes if node.op_type == "MatMulNBits"}
    assert inputs == ({3, 4} if options.share else {4})
    report = verify(package, checkpoints[name], tokens=8, limits=Limits())
    assert report.passed, report.failures()
    assert report.worst < 1e-5


def test_the_costliest_for_their_size_are_chosen_within_the_budget() -> None:
    sizes, costs = {"a": 10, "b": 4, "c": 4, "d": 1}, {"a": 30.0, "b": 8.0, "c": 4.0, "d": 0.1}
    assert most_sensitive(sizes, costs, 14) == {"a", "b"}
    assert most_sensitive(sizes, costs, 9) == {"b", "c", "d"}  # a does not fit
    assert most_sensitive(sizes, costs, 0) == set()


@pytest.mark.parametrize("name", ["melt", "looplm"])
def test_what_does_not_reach_the_logits_costs_nothing(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    kind = {"melt": MeltForCausalLM, "looplm": LoopLMForCausalLM}[name]
    model = kind.from_pretrained(checkpoints[name])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "dead")
    cost = sensitivities(Checkpoint(tmp_path / "dead").load(), TOKENS, 2, 8, Grid(4, 32))
    dead = {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert {name for name, value in cost.items() if value == 0} == dead | {"model.early_exit_gate.weight"}


def test_a_cost_is_of_every_loop_and_of_the_weights_as_they_are_stored(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = MeltForCausalLM.from_pretrained(checkpoints["melt"])
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    model.float().save_pretrained(tmp_path / "wide")  # the same numbers
    wide, narrow = (Checkpoint(tmp_path / name).load() for name in ("wide", "narrow"))
    once, twice = (sensitivities(wide, TOKENS, loops, 8, Grid(4, 32)) for loops in (1, 2))
    assert twice != once
    assert sensitivities(narrow, TOKENS, 2, 8, Grid(4, 32)) == pytest.approx(twice, rel=1e-4)


def test_an_expected_rounding_error_is_the_one_that_is_made() -> None:
    weight, grid = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), Grid(4, 32)
    made = (round_to_nearest(weight, grid).values() - weight).square().mean()
    assert rounding_error(weight, grid) == pytest.approx(float(made), rel=0.3)


def test_int4_stores_what_suffers_most_in_eight_bits(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pure = export(checkpoints["melt"], tmp_path / "pure", WeightOptions("int4", int8_share=0))
    assert set(bits_of(pure).values()) == {4}
    mixed = export(checkpoints["melt"], tmp_path / "mixed", WeightOptions("int4"))
    raised = {name for name, bits in bits_of(mixed).items() if bits == 8}
    assert raised
    record = json.loads((mixed / "manifest.json").read_text())["weights"]
    assert (record["int8_share"], set(record["raised"])) == (0.1, raised)
    products = [onnx.load(p / "loop_step.onnx").graph.initializer for p in (pure, mixed)]
    sizes = [sum(len(t.raw_data) for t in tensors if re.search(r"\.(q|scales)$", t.name)) for tensors in products]
    assert sizes[0] < sizes[1] <= 1.1 * sizes[0]
    named = export(checkpoints["melt"], tmp_path / "named", WeightOptions("int4", int8=("*.o_proj.weight",)))
    assert {name for name, bits in bits_of(named).items() if bits == 8} == {n for n in bits_of(pure) if "o_proj" in n}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "int8", "asymmetric": True}, "asymmetric blocks need int4 weights"),
        ({"kind": "int4", "int8_share": 1.5}, "int8 share is 1.5"),
        ({"kind": "int4", "int8_share": 0.1, "method": "rtn"}, "the method gptq"),
        ({"kind": "int8", "int8_share": 0.1}, "needs int4 weights"),
    ],
)
def test_bits_that_cannot_be_had_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        WeightOptions(**fields)


def test_engines_get_no_zero_points() -> None:
    with pytest.raises(ExportError, match="TensorRT reads no 4-bit zero points"):
        ExportOptions(dialect="standard", weights=WeightOptions("int4", asymmetric=True))
