"""Weights in 4 and 8 bits: the numbers themselves, the packages that hold them, and what is said of their quality."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltConfig, MeltForCausalLM
from melt_models.checkpoint import read_config
from melt_runtime import Runtime
from melt_runtime.package.manifest_facts import activations_of, arithmetic_of
from melt_runtime.package.reader import Package

from melt_export.checkpoint import Checkpoint
from melt_export.errors import ExportError
from melt_export.export import building
from melt_export.graph.merge_matmuls import names_in
from melt_export.options import ExportOptions
from melt_export.parity.report import Limits, Quality
from melt_export.parity.verify import verify
from melt_export.quantization.blocks import Blocks, round_to_nearest
from melt_export.quantization.calibration import calibration_tokens, hessians
from melt_export.quantization.gptq import InverseHessian, gptq
from melt_export.quantization.options import Grid, WeightOptions


@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([4, 8]), st.sampled_from([16, 32, 64]), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_rounding_errs_by_no_more_than_a_step(outputs: int, inputs: int, bits: int, block: int, seed: int) -> None:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    found = round_to_nearest(weight, Grid(bits, block))
    steps = found.scales.abs().repeat_interleave(block, dim=1)[:, :inputs]
    # A block's largest value may be clipped by the share of the widest scale that was tried last.
    widest = torch.nn.functional.pad(weight, (0, -inputs % block)).unflatten(1, (-1, block)).abs().amax(-1)
    slack = 0.3 * widest.repeat_interleave(block, dim=1)[:, :inputs] if bits == 4 else 0
    assert ((found.values() - weight).abs() <= steps + slack).all()
    again = Blocks.unpacked(found.packed(), found.scales, bits, inputs)
    assert torch.equal(again.values(), found.values())


def test_zero_weights_stay_zero() -> None:
    weight = torch.zeros(4, 40)
    assert not round_to_nearest(weight, Grid(4, 32)).values().any()
    assert not gptq(weight, InverseHessian.of(torch.eye(40)), Grid(4, 32)).values().any()


@pytest.mark.parametrize("bits", [4, 8])
def test_calibration_errs_less_on_inputs_like_those_it_saw(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(96, 96, generator=generator) * torch.linspace(0.05, 2, 96)
    seen, unseen = (torch.randn(2000, 96, generator=generator) @ mix for _ in range(2))
    weight = torch.randn(48, 96, generator=generator)
    plain = round_to_nearest(weight, Grid(bits, 32)).values()
    calibrated = gptq(weight, InverseHessian.of(seen.t() @ seen), Grid(bits, 32)).values()
    plain_error, error = ((unseen @ (values - weight).t()).square().mean() for values in (plain, calibrated))
    assert error < 0.7 * plain_error


def test_names_of_packed_weights_come_apart() -> None:
    known = {"m.0.gate.input_proj.weight", "m.0.attn.q_proj.weight", "m.0.attn.k_proj.weight", "lm_head.weight"}
    assert names_in("lm_head.weight", known) == ["lm_head.weight"]
    packed = "m.0.gate.input_proj+attn.q_proj.weight"
    assert names_in(packed, known) == ["m.0.gate.input_proj.weight", "m.0.attn.q_proj.weight"]
    with pytest.raises(ExportError, match="does not have"):
        names_in("m.0.attn.x_proj.weight", known)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A MELT with a head of its own, one with a tied head, and a LoopLM."""
    root = tmp_path_factory.mktemp("quantize")
    found = {}
    for name, kind, extra in (
        ("melt", MeltForCausalLM, {}),
        ("tied", MeltForCausalLM, {"tie_word_embeddings": True}),
        ("looplm", LoopLMForCausalLM, {}),
    ):
        torch.manual_seed(3)
        fields = {**TINY, **extra}
        if name == "looplm":
            fields = {k: v for k, v in fields.items() if k in LoopLMConfig().to_dict()}
        config = (LoopLMConfig if name == "looplm" else MeltConfig)(**fields)
        found[name] = root / name
        kind(config).save_pretrained(found[name])
    return found


def export(checkpoint: Path, output: Path, weights: WeightOptions | None, **options: object) -> Path:
    """A package that was not verified."""
    with building(checkpoint, output, ExportOptions(max_batch=2, weights=weights, **options)):  # type: ignore[arg-type]
        pass
    return output


@pytest.mark.parametrize("name", ["melt", "tied", "looplm"])
@pytest.mark.parametrize(
    "options",
    [
        WeightOptions("int8"),
        WeightOptions("int4", method="rtn", block=16, activations="float"),
        WeightOptions("int4", int8=("*.down_proj.weight", "*.v_proj.weight")),
    ],
)
def test_a_package_computes_with_its_numbers(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, options: WeightOptions
) -> None:
    package = export(checkpoints[name], tmp_path / "package", options)
    report = verify(package, checkpoints[name], tokens=12, limits=Limits())
    assert report.passed, report.failures()
    assert report.worst < 1e-5
    assert report.quality is not None
    assert report.quality.kl > 0
    assert json.loads((package / "parity.json").read_text())["quality"]["text"] == "random tokens"
    manifest = Package.open(package).manifest
    assert manifest.weights["method"] == options.method
    assert manifest.weights["activations"] == report.quality.activations == options.activations
    written = json.loads((package / "parity.json").read_text())
    if options.activations == "float":
        assert "as shipped" in written["arithmetic"]
        assert written["quality"]["float_kl"] is None
        assert "int4 weights are multiplied on the CPU with float activations" in arithmetic_of(manifest)
        assert "with float activations," in report.quality.summary()
    else:
        # What is compared is not what is shipped: the report says so, and what the difference costs.
        assert "the package itself multiplies them with 8-bit activations" in written["arithmetic"]
        quality = written["quality"]
        assert 0 < quality["float_kl"] != quality["kl"]
        assert quality["float_kl"] < quality["kl"] or options.kind == "int4"  # there the weights' own error is larger
        assert "weights are multiplied on the CPU with 8-bit activations" in arithmetic_of(manifest)
        assert f"with 8-bit activations ({report.quality.float_kl:.1e} with float ones" in report.quality.summary()


def test_fewer_bits_take_less_and_cost_more(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    plain = export(checkpoints["melt"], tmp_path / "plain", None)
    sizes, quality = [(plain / "weights.data").stat().st_size], []
    for kind in ("int8", "int4"):
        package = export(checkpoints["melt"], tmp_path / kind, WeightOptions(kind, method="rtn"))
        sizes.append(sum(path.stat().st_size for path in package.glob("*.data")))
        report = verify(package, checkpoints["melt"], tokens=2, limits=Limits())
        assert report.quality is not None
        quality.append(report.quality.kl)
    assert sizes[0] > sizes[1] > sizes[2]
    assert quality[0] < quality[1]


def test_a_changed_number_fails_parity(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Against the checkpoint's own quantized weights, not against themselves."""
    package = export(checkpoints["melt"], tmp_path / "package", WeightOptions("int8"))
    other = tmp_path / "other"
    shutil.copytree(checkpoints["melt"], other)
    torch.manual_seed(4)
    MeltForCausalLM(read_config(other)).save_pretrained(other)
    report = verify(package, other, tokens=2)
    assert not report.passed


def test_kept_weights_stay(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    keep = ("*.down_proj.weight", "model.layers.0.self_attn.[kv]_proj.weight")
    package = export(checkpoints["melt"], tmp_path / "package", WeightOptions("int8", keep=keep))
    graph = onnx.load(package / "loop_step.onnx", load_external_data=False).graph
    products = [node.name for node in graph.node if node.op_type == "MatMul"]
    layers = TINY["num_hidden_layers"]
    assert sum("down_proj" in name for name in products) == layers
    assert sum("k_proj" in name for name in products) == 1
    assert verify(package, checkpoints["melt"], tokens=4).passed
    with pytest.raises(ExportError, match="matches no weight"):
        export(checkpoints["melt"], tmp_path / "typo", WeightOptions("int8", keep=("*.donw_proj.weight",)))
    assert not (tmp_path / "typo").exists()


def test_chosen_weights_have_eight_bits(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = WeightOptions("int4", method="rtn", int8=("*.v_proj.weight",))
    graph = onnx.load(export(checkpoints["melt"], tmp_path / "package", options) / "loop_step.onnx").graph
    bits = {
        node.name: next(a.i for a in node.attribute if a.name == "bits")
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    assert {value for name, value in bits.items() if "v_proj" in name} == {8}
    assert {value for name, value in bits.items() if "v_proj" not in name} == {4}


def test_statistics_are_of_every_loop(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint(checkpoints["melt"])
    config, tokens = checkpoint.config, [[1, 2, 3, 4]]
    once, thrice = (hessians(checkpoint.load(), tokens, loops, 4) for loops in (1, 3))
    name = "model.layers.0.mlp.down_proj.weight"
    assert once[name].shape == (config.intermediate_size, config.intermediate_size)
    assert thrice[name].trace() > 1.5 * once[name].trace()
    q, gate = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.latent_gate.input_proj.weight"
    assert torch.equal(once[q], once[gate])  # both read the normed input
    k, v = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(thrice[k], thrice[v])
    assert not torch.equal(thrice[k], thrice[q])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "int3"}, "int3"),
        ({"kind": "int4", "block": 24}, "block is 24"),
        ({"kind": "int4", "method": "awq"}, "awq"),
        ({"kind": "int8", "method": "rtn", "calibration": Path("text")}, "only the method gptq"),
    ],
)
def test_bad_options_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        WeightOptions(**fields)


@pytest.mark.parametrize(
    "options", [{"dialect": "portable"}, {"precision": "fp16"}, {"dialect": "standard", "precision": "bf16"}]
)
def test_where_it_does_not_work_it_is_refused(options: dict) -> None:
    with pytest.raises(ExportError, match="onnxruntime at precision fp32"):
        ExportOptions(weights=WeightOptions("int4"), **options)


def test_a_calibration_text_needs_a_tokenizer(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("anything")
    with pytest.raises(ExportError, match="needs a tokenizer"):
        calibration_tokens(Checkpoint(checkpoints["melt"]), text)


def test_limits_on_quality() -> None:
    figures = {"text": "t", "positions": 10, "kl": 0.02, "top1": 0.9, "perplexity": 10.6, "checkpoint_perplexity": 10.0}
    assert not Quality(**figures, limits=Limits(0.03, 7)).failures()  # type: ignore[arg-type]
    assert "KL of 2.00e-02" in Quality(**figures, limits=Limits(0.01)).failures()[0]  # type: ignore[arg-type]
    assert "6.00%" in Quality(**figures, limits=Limits(None, 5)).failures()[0]  # type: ignore[arg-type]
    broken = Quality(**{**figures, "kl": float("nan")}, limits=Limits(0.01))  # type: ignore[arg-type]
    assert broken.failures()


def test_a_quantized_package_generates_alike_alone_and_in_a_batch(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    runtime = Runtime.load(export(checkpoints["melt"], tmp_path / "package", WeightOptions("int8")))
    prompts = [[5, 6, 7], [9]]
    together = runtime.generate(prompts, max_tokens=8, ignore_eos=True)
    alone = [runtime.generate(prompt, max_tokens=8, ignore_eos=True) for prompt in prompts]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert np.isfinite(runtime.driver().append([[1]], runtime.options().loops)).all()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["melt", "tied", "looplm"])
def test_a_standard_package_computes_with_its_numbers(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, precision: str
) -> None:
    options = WeightOptions("int4", int8=("*.v_proj.weight",), activations="float" if precision == "fp32" else "int8")
    package = export(checkpoints[name], tmp_path / "package", options, dialect="standard", precision=precision)
    nodes = onnx.load(package / "loop_step.onnx", load_external_data=False).graph.node
    stored = [node for node in nodes if node.op_type == "DequantizeLinear"]
    assert {any(a.name == "block_size" for a in node.attribute) for node in stored} == {True, False}
    report = verify(package, checkpoints[name], tokens=12, limits=Limits())
    assert report.passed, report.failures()
    assert report.quality is not None
    assert report.quality.kl > 0


def test_activations_that_are_none_are_refused() -> None:
    with pytest.raises(ExportError, match="activations 'int4' are not one of int8, float"):
        WeightOptions("int4", activations="int4")


def test_a_package_of_before_has_activations_in_8_bits(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    package = export(checkpoints["melt"], tmp_path / "package", WeightOptions("int8", method="rtn"))
    content = json.loads((package / "manifest.json").read_text())
    del content["weights"]["activations"]
    (package / "manifest.json").write_text(json.dumps(content))
    assert activations_of(Package.open(package).manifest) == "int8"


def test_what_blocks_do_not_fit_has_eight_bits(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = WeightOptions("int4", block=128, method="rtn")
    package = export(checkpoints["melt"], tmp_path / "package", options, dialect="standard", precision="fp16")
    nodes = onnx.load(package / "loop_step.onnx", load_external_data=False).graph.node
    assert not any(a.name == "block_size" for n in nodes if n.op_type == "DequantizeLinear" for a in n.attribute)
    assert verify(package, checkpoints["melt"], tokens=4, limits=Limits()).passed


def test_positive_scales_are_positive_and_cost_little() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    any_sign, positive = (round_to_nearest(weight, Grid(4, 32, positive)) for positive in (False, True))
    assert (positive.scales > 0).all()
    errors = [(found.values() - weight).square().mean() for found in (any_sign, positive)]
    assert errors[1] < 1.2 * errors[0]
