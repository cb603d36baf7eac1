"""A package computes what its checkpoint computes: every dialect, every model variant, every loop.

``verify`` runs a ragged batch of three prompts and a single one, chunk sizes 8 and 1, and early exit on and off.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, MakePackage
from safetensors.torch import load_file, save_file
from torch import Tensor

from melt_export.errors import ParityError
from melt_export.parity.distances import MULTIPLE
from melt_export.parity.report import TOLERANCES, GenerationResult, ParityReport, StateError
from melt_export.parity.verify import require_parity, verify

DIALECTS = ("onnxruntime", "standard", "portable")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("norm_layout", ["sandwich", "pre"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_every_loop_agrees_with_pytorch(
    make_checkpoint: MakeCheckpoint,
    make_package: MakePackage,
    dialect: str,
    norm_layout: str,
    tied: bool,
    kv_heads: int,
) -> None:
    checkpoint = make_checkpoint(norm_layout=norm_layout, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    package = make_package(checkpoint, dialect=dialect, max_batch=3)
    for loops in (1, 2, 4):
        report = verify(package, checkpoint, loops=loops, tokens=12)
        assert report.failures() == []
        assert {state.loop for state in report.states} == set(range(1, loops + 1))
        assert all(run.same == run.tokens for run in report.generations)
        assert report.exit_same_depth == report.exit_tokens
        if loops == 4:
            assert 0 < report.exit_threshold < 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_latent_that_starts_at_zero_agrees_too(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, dialect: str
) -> None:
    checkpoint = make_checkpoint(latent_init="zeros")
    assert verify(make_package(checkpoint, dialect=dialect), checkpoint, tokens=8).failures() == []


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_cache_of_few_rows_agrees_too(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, dialect: str
) -> None:
    checkpoint = make_checkpoint(num_hidden_layers=1)
    package = make_package(checkpoint, dialect=dialect, max_seq_len=3, max_batch=1)
    assert verify(package, checkpoint, tokens=3).failures() == []


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_scaled_rotary_embeddings_agree_too(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, rope_type: str
) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    checkpoint = make_checkpoint(rope_parameters=rope)
    assert verify(make_package(checkpoint), checkpoint, tokens=8).failures() == []


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_lower_precision_stays_within_its_tolerance(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, dialect: str, precision: str
) -> None:
    checkpoint = make_checkpoint()
    report = verify(make_package(checkpoint, dialect=dialect, precision=precision), checkpoint, tokens=16)
    assert report.failures() == []
    assert 0 < report.kl_mean <= report.kl_max
    assert report.worst > 1e-6  # it is not fp32 in disguise


def test_a_package_for_one_sequence_agrees(make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> None:
    checkpoint = make_checkpoint()
    package = make_package(checkpoint, max_batch=1, max_seq_len=24, chunk=4)
    assert verify(package, checkpoint, tokens=64).failures() == []


def test_a_changed_weight_is_found(tiny_checkpoint: Path, package_copy: Path) -> None:
    with (package_copy / "weights.data").open("r+b") as weights:
        weights.seek(8192)
        weights.write(np.ones(64, np.float32).tobytes())
    report = verify(package_copy, tiny_checkpoint, tokens=4)
    assert not report.passed
    with pytest.raises(ParityError, match="does not match its checkpoint"):
        require_parity(report)


LAST = "model.layers.1"
FIXED_LIMIT = 1e-4  # of a model that makes little of rounding


def add(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[name].view(-1)[3:4].add_(value)  # type: ignore[func-returns-value]


def scale(name: str, factor: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[name].view(-1)[3:4].mul_(factor)  # type: ignore[func-returns-value]


def swap_rows(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][[3, 4]] = tensors[name][[4, 3]].clone()

    return change


PLANTED = {
    "one number of a gate's bias": add(f"{LAST}.latent_gate.bias", 0.1),
    "one number of a norm": scale(f"{LAST}.post_attention_layernorm.weight", 1.05),
    "one number of the last norm": scale("model.norm.weight", 1.05),
    "two rows of the values' product": swap_rows(f"{LAST}.self_attn.v_proj.weight"),
    "two rows of the last product": swap_rows(f"{LAST}.mlp.down_proj.weight"),
    "two rows of the head": swap_rows("lm_head.weight"),
    "two rows of the embedding": swap_rows("model.embed_tokens.weight"),
}


@pytest.fixture(scope="module", params=["ordinary", "sensitive"])
def faithful(
    request: pytest.FixtureRequest,
    make_checkpoint: MakeCheckpoint,
    make_package: MakePackage,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, bool]:
    """A checkpoint and a right package of it that a test may write a report into; whether the model makes much of
    rounding: large activations over many loops."""
    sensitive = request.param == "sensitive"
    checkpoint = make_checkpoint(initializer_range=0.2, total_ut_steps=16) if sensitive else make_checkpoint()
    package = shutil.copytree(make_package(checkpoint), tmp_path_factory.mktemp("faithful") / "package")
    return checkpoint, Path(package), sensitive


def test_a_right_package_passes_however_much_its_model_makes_of_rounding(faithful: tuple[Path, Path, bool]) -> None:
    checkpoint, package, sensitive = faithful
    report = verify(package, checkpoint, tokens=24)
    assert report.failures() == []
    assert (max(state.relative for state in report.states) > FIXED_LIMIT) == sensitive
    assert all(state.limit <= max(FIXED_LIMIT, MULTIPLE * state.own) for state in report.states)
    assert f"(limit {report.closest.limit:.0e}; PyTorch's own float32 is {report.closest.own:.0e}" in report.summary()


@pytest.mark.parametrize("fault", PLANTED)
def test_one_wrong_number_or_swapped_row_is_found_in_any_model(
    faithful: tuple[Path, Path, bool], tmp_path: Path, fault: str
) -> None:
    checkpoint, package, _ = faithful
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    PLANTED[fault](tensors)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    report = verify(package, other, tokens=1)
    assert not report.passed
    assert report.closest.relative > 3 * report.closest.limit


def test_a_swapped_row_of_the_embedding_is_found_though_no_prompt_holds_its_token(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(vocab_size=2000, num_hidden_layers=1, total_ut_steps=1)
    package = shutil.copytree(make_package(checkpoint), tmp_path / "package")
    assert verify(package, checkpoint, tokens=1).passed
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    swap_rows("model.embed_tokens.weight")(tensors)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (failure,) = verify(package, other, tokens=1).failures()
    assert failure.startswith("embedding of loop 1 differs by 1.")


def report_of(**fields: Any) -> ParityReport:
    return ParityReport("fp32", "onnxruntime", 4, "", TOLERANCES["fp32"], **fields)


def test_a_limit_that_proves_nothing_is_told_from_a_wrong_package() -> None:
    (failure,) = report_of(states=[StateError("latent", 2, relative=0.05, limit=0.4, own=0.05)]).failures()
    assert (
        failure
        == "nothing can be told from latent of loop 2: PyTorch's own float32 differs by 5.0e-02 from its float64"
    )
    # every weight has its effect in two loops: what later ones make of rounding proves nothing and disproves nothing
    assert report_of(states=[StateError("latent", 4, relative=0.05, limit=0.4, own=0.05)]).passed


def test_runs_may_part_only_where_rounding_can_swap_two_tokens() -> None:
    parted = {"prompt_tokens": 3, "chunk": 8, "tokens": 10, "same": 4, "tie": 1e-3}
    report = report_of(generations=[GenerationResult(**parted, margin=1e-4)])
    assert report.failures() == []
    assert "4/10 the same (1 of 1 runs part at a tie)" in report.summary()
    report = report_of(generations=[GenerationResult(**parted, margin=1e-2)])
    assert "parts at token 5 of 10, where the best logit led by 1.0e-02" in report.failures()[0]


def test_the_report_in_the_package_holds_the_figures(tiny_checkpoint: Path, package_copy: Path) -> None:
    report = verify(package_copy, tiny_checkpoint, tokens=4)
    written = json.loads((package_copy / "parity.json").read_text())
    assert written["passed"] is True
    assert written["kl_mean"] == report.kl_mean
    assert written["tolerance"]["relative"] == 1e-4
    assert {s["quantity"] for s in written["states"]} == {
        "embedding",
        "hidden",
        "latent",
        "exit probability",
        "key rows",
        "value rows",
        "logits",
        "staggered hidden",
        "staggered logits",
    }


@pytest.mark.parametrize(
    "fields",
    [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 8}, {"aggregation": "mean"}],
    ids=str,
)
def test_a_checkpoint_of_another_shape_is_refused(
    fields: dict[str, Any], make_checkpoint: MakeCheckpoint, package_copy: Path
) -> None:
    with pytest.raises(ParityError, match=r"the package was (not made from|made from another)") as caught:
        verify(package_copy, make_checkpoint(**fields), tokens=4)
    assert next(iter(fields)) in str(caught.value) or "latent of loop 1 has the shape" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("loops", 3), ("exit_threshold", 0.5)])
def test_a_package_that_thinks_less_deep_than_its_checkpoint_says_is_refused(
    name: str, value: float, tiny_checkpoint: Path, package_copy: Path
) -> None:
    manifest = package_copy / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), name: value}))
    with pytest.raises(ParityError, match=rf"{name} is {value} in the package"):
        verify(package_copy, tiny_checkpoint, tokens=4)


@pytest.mark.filterwarnings("error")
def test_a_model_whose_numbers_overflow_fails_without_a_warning(
    tiny_checkpoint: Path, make_package: MakePackage, tmp_path: Path
) -> None:
    large = Path(shutil.copytree(tiny_checkpoint, tmp_path / "large"))
    tensors = load_file(large / "model.safetensors")
    save_file({name: tensor.fill_(1e38) for name, tensor in tensors.items()}, large / "model.safetensors")
    report = verify(make_package(large), large, tokens=4)
    assert not report.passed
    assert "PyTorch's own float32 differs" in report.failures()[0]


def test_another_checkpoint_is_refused(make_checkpoint: MakeCheckpoint, tiny_package: Path) -> None:
    with pytest.raises(ParityError, match="num_hidden_layers"):
        verify(tiny_package, make_checkpoint(num_hidden_layers=1), tokens=4)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_graphs_pass_the_checker_with_full_shape_inference(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, dialect: str
) -> None:
    package = make_package(make_checkpoint(), dialect=dialect)
    for graph in ("embed", "loop_step", "lm_head"):
        onnx.checker.check_model(str(package / f"{graph}.onnx"), full_check=True)


def test_only_the_dialects_own_operators_are_used(make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> None:
    expected = {"onnxruntime": {"", "com.microsoft"}, "standard": {""}, "portable": {""}}
    opsets = {"onnxruntime": 23, "standard": 24, "portable": 18}
    for dialect, domains in expected.items():
        model = onnx.load(make_package(make_checkpoint(), dialect=dialect) / "loop_step.onnx", load_external_data=False)
        assert {node.domain for node in model.graph.node} == domains
        assert {o.domain: o.version for o in model.opset_import}[""] == opsets[dialect]


def test_nodes_say_where_they_come_from(tiny_package: Path) -> None:
    graph = onnx.load(tiny_package / "loop_step.onnx", load_external_data=False).graph
    branches = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    names = [node.name for part in (graph, *branches) for node in part.node]
    assert len(set(names)) == len(names)
    for name in (
        "/layers.1/self_attn/GroupQueryAttention",
        "/layers.0/latent_gate/Sigmoid",
        "/layers.0/mlp/down_proj/MatMul",
    ):
        assert name in names
    stored = {init.name for init in graph.initializer}
    assert "model.layers.1.latent_gate.latent_proj.weight" in stored
    assert [i.name for i in graph.input][:4] == ["hidden", "first_loop", "active", "lengths"]


def test_a_tied_head_shares_the_embedding_on_disk(make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> None:
    def head_bytes(tied: bool) -> int:
        package = make_package(make_checkpoint(tie_word_embeddings=tied, vocab_size=500))
        return (package / "weights.data").stat().st_size

    assert head_bytes(False) - head_bytes(True) >= 500 * 64 * 4


def test_a_package_can_be_moved(tiny_package: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_package, tmp_path / "elsewhere" / "package"))
    assert verify(moved, tiny_checkpoint, tokens=4).passed
