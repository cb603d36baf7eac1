"""Engines built by TensorRT-RTX, which needs no GPU for it. What a graph must be to become one, and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import BackendError, Package
from melt_runtime.cli.inspect import describe
from melt_runtime.cli.main import app as run_app
from melt_runtime.engines.build import EngineOptions, build_engine
from melt_runtime.engines.library import Library, open_library
from melt_runtime.engines.network import Network, add_candidates, parse, quantize_matmuls
from melt_runtime.engines.network_checks import inspect_network
from melt_runtime.engines.profiles import length_buckets
from melt_runtime.engines.store import open_engine
from melt_runtime.errors import ArgumentError
from onnx import helper
from typer.testing import CliRunner

from melt_export.cli import export_app

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'melt-export[tensorrt-rtx]'")

DEMO = Path(__file__).parent.parent / "examples" / "addition-melt"
Edit = Callable[[onnx.GraphProto], None]


@pytest.fixture(scope="module")
def library() -> Library:
    """TensorRT-RTX."""
    return open_library("tensorrt-rtx")


@pytest.fixture
def standard(make_package: MakePackage, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Package:
    """The usual small model in fp16 in the standard dialect, which a test may spoil."""
    source = make_package(make_checkpoint(), dialect="standard", precision="fp16")
    return Package.open(shutil.copytree(source, tmp_path / "standard"))


def edited(package: Package, edit: Edit) -> None:
    """Changes the loop step's graph."""
    path = package.path("loop_step")
    model = onnx.load(path, load_external_data=False)
    edit(model.graph)
    onnx.save(model, path)


def parsed(package: Package, library: Library) -> Network:
    """The loop step as the parser reads it."""
    return parse(library, library.builder(), package.path("loop_step"))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_the_demo_checkpoint_becomes_an_engine(make_package: MakePackage, tmp_path: Path, precision: str) -> None:
    directory = shutil.copytree(make_package(DEMO, dialect="standard", precision=precision), tmp_path / "package")
    spec = build_engine(Package.open(directory), EngineOptions())
    package = Package.open(directory)
    assert package.manifest.engines == {f"tensorrt-rtx-{precision}": spec}
    assert (spec.precision, spec.weights, spec.dialect) == (precision, None, "standard")
    assert [profile.name for profile in spec.profiles] == ["decode", "pipelined", "prefill"]
    assert spec.buckets == length_buckets(package.manifest.cache_rows)
    plans = open_engine(package, f"tensorrt-rtx-{precision}", version=spec.version)
    assert list(plans) == ["embed", "loop_step", "lm_head"]


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_demo_checkpoint_becomes_an_engine_with_small_weights(
    make_package: MakePackage, tmp_path: Path, precision: str, weights: str
) -> None:
    directory = shutil.copytree(make_package(DEMO, dialect="standard", precision=precision), tmp_path / "package")
    spec = build_engine(Package.open(directory), EngineOptions(weights=weights))
    assert Package.open(directory).manifest.engines == {f"tensorrt-rtx-{precision}-{weights}": spec}


def test_two_layers_of_ouro_1_4b_become_engines_whose_size_follows_their_weights(
    make_package: MakePackage, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
    checkpoint = make_checkpoint(**shape, chunk_size=128, max_position_embeddings=4096)
    source = make_package(checkpoint, dialect="standard", precision="fp16")
    package = Package.open(shutil.copytree(source, tmp_path / "package"))
    weights = package.manifest.files["weights.data"].bytes
    wide, narrow = (build_engine(package, EngineOptions(weights=w)).files["loop_step"].bytes for w in (None, "int4"))
    assert 0.9 * weights < wide < 1.2 * weights
    assert 0.25 * wide < narrow < 0.35 * wide


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_the_portable_dialect_becomes_an_engine(make_package: MakePackage, tmp_path: Path, precision: str) -> None:
    directory = shutil.copytree(make_package(DEMO, dialect="portable", precision=precision), tmp_path / "package")
    assert build_engine(Package.open(directory), EngineOptions()).dialect == "portable"


def test_options_reach_the_engine_and_its_entry(standard: Package) -> None:
    options = EngineOptions(
        compute_capabilities=("8.9", "12.0"), workspace=64, weight_streaming=True, max_batch=2, weights="int4"
    )
    spec = build_engine(standard, options)
    assert spec.compute_capabilities == ("8.9", "12.0")
    assert spec.profiles[-1].batch == (1, 1, 2)
    assert spec.options == {
        "max_batch": 2,
        "compute_capability": ["8.9", "12.0"],
        "workspace": 64,
        "weight_streaming": True,
    }


def test_fp8_weights_are_for_devices_that_have_fp8(standard: Package) -> None:
    assert build_engine(standard, EngineOptions(weights="fp8")).compute_capabilities[0] == "8.9"


def test_an_engine_for_turing_is_built_when_asked_for(standard: Package) -> None:
    assert build_engine(standard, EngineOptions(compute_capabilities=("7.5",))).compute_capabilities == ("7.5",)


def test_decoding_has_a_profile_of_exactly_one_token(standard: Package) -> None:
    assert build_engine(standard, EngineOptions()).profiles[0].chunk == (1, 1, 1)


def test_small_weights_are_smaller_in_the_engine(
    make_package: MakePackage, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1}
    source = make_package(make_checkpoint(**wide), dialect="standard", precision="fp16")
    package = Package.open(shutil.copytree(source, tmp_path / "package"))
    stored = {}
    for weights in (None, "int8", "int4"):
        stored[weights] = build_engine(package, EngineOptions(weights=weights)).files["loop_step"].bytes
    assert stored[None] - stored["int8"] > 0.45 * package.manifest.files["weights.data"].bytes
    assert stored["int8"] - stored["int4"] > 0.15 * package.manifest.files["weights.data"].bytes


def test_every_wide_product_is_quantized(standard: Package, library: Library) -> None:
    network = parsed(standard, library)
    quantize_matmuls(network, standard.path("loop_step"), "int4", "float16")
    kinds = [network.kind(source) for _, source in network.matmuls()]
    # Per layer: two of the gate, four of the attention, three of the MLP; the exit gate is a vector.
    assert (kinds.count("DEQUANTIZE"), kinds.count("CONSTANT")) == (2 * 9, 1)
    inspect_network(network, "loop_step", standard.manifest, "int4")


def test_the_head_also_gives_the_likeliest_tokens_and_the_log_sum(standard: Package, library: Library) -> None:
    network = parse(library, library.builder(), standard.path("lm_head"))
    vocab = standard.manifest.vocab_size
    assert add_candidates(network, vocab) == vocab  # as many as there are, up to 256
    found = {name: (tuple(t.shape), str(t.dtype).rpartition(".")[2]) for name, t in network.outputs().items()}
    assert found == {
        "logits": ((-1, -1, vocab), "FLOAT"),
        "top_logits": ((-1, -1, vocab), "FLOAT"),
        "top_ids": ((-1, -1, vocab), "INT32"),
        "log_sum": ((-1, -1, 1), "FLOAT"),
    }


def test_a_product_that_stayed_wide_is_found(standard: Package, library: Library) -> None:
    with pytest.raises(BackendError, match="are not int4"):
        inspect_network(parsed(standard, library), "loop_step", standard.manifest, "int4")


def test_what_the_exporter_writes_passes_inspection(standard: Package, library: Library) -> None:
    inspect_network(parsed(standard, library), "loop_step", standard.manifest)


def attention(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The attention nodes."""
    return [node for node in graph.node if node.op_type == "Attention"]


def test_nonpad_kv_seqlen_is_refused_because_the_parser_ignores_it(standard: Package) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        graph.node.insert(0, helper.make_node("Add", ["lengths", "lengths"], ["seen"]))
        for node in attention(graph):
            del node.input[3:]
            node.input.extend(["", "", "", "seen"])
            node.attribute.append(helper.make_attribute("is_causal", 1))

    edited(standard, edit)
    with pytest.raises(BackendError, match=r"parser ignores seen, an input of /layers\.0/self_attn/Attention"):
        build_engine(standard, EngineOptions())
    assert not (standard.directory / "engines").exists()


def test_an_attention_without_the_mask_is_refused(standard: Package, library: Library) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        for node in attention(graph):
            del node.input[3:]

    edited(standard, edit)
    with pytest.raises(BackendError, match="ignores attention_mask"):
        inspect_network(parsed(standard, library), "loop_step", standard.manifest)


def test_a_cache_that_is_not_updated_in_place_is_refused(standard: Package, library: Library) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "TensorScatter")
        node.op_type = "Identity"
        del node.input[1:], node.attribute[:]

    edited(standard, edit)
    with pytest.raises(BackendError, match=r"next_key_cache\.0 is not the output of a KV_CACHE_UPDATE"):
        inspect_network(parsed(standard, library), "loop_step", standard.manifest)


def test_an_attention_over_the_old_cache_is_refused(standard: Package, library: Library) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        node = next(n for n in graph.node if n.op_type == "Slice" and n.input[0] == "next_key_cache.1")
        node.input[0] = "key_cache.1"

    edited(standard, edit)
    with pytest.raises(BackendError, match=r"the keys of /layers\.1/.* are not an updated cache"):
        inspect_network(parsed(standard, library), "loop_step", standard.manifest)


def test_an_attention_over_the_whole_buffer_is_refused(standard: Package, library: Library) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        for node in attention(graph)[:1]:
            node.input[1], node.input[2] = "next_key_cache.0", "next_value_cache.0"

    edited(standard, edit)
    with pytest.raises(BackendError, match="attends to the whole buffer"):
        inspect_network(parsed(standard, library), "loop_step", standard.manifest)


def test_an_attention_that_may_fall_apart_is_refused(standard: Package, library: Library) -> None:
    network = parsed(standard, library)
    for layer in network.layers("ATTENTION_INPUT"):
        layer.attention.decomposable = True
    with pytest.raises(BackendError, match="is decomposable"):
        inspect_network(network, "loop_step", standard.manifest)


def test_an_input_that_nothing_reads_is_refused(standard: Package, library: Library) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            if node.op_type == "Unsqueeze" and node.input[0] == "first_loop":
                node.op_type, node.input[0] = "Cast", "next"
                del node.input[1:]
                node.attribute.append(helper.make_attribute("to", onnx.TensorProto.BOOL))
        graph.node.insert(
            0,
            helper.make_node(
                "Constant", [], ["next"], value=helper.make_tensor("v", onnx.TensorProto.BOOL, [1, 1], [1])
            ),
        )

    edited(standard, edit)
    with pytest.raises(BackendError, match="no output depends on the input first_loop"):
        inspect_network(parsed(standard, library), "loop_step", standard.manifest)


def test_a_graph_that_cannot_be_read_is_refused_in_the_parsers_words(standard: Package, library: Library) -> None:
    def edit(graph: onnx.GraphProto) -> None:
        graph.node[5].op_type = "NoSuchOperator"

    edited(standard, edit)
    with pytest.raises(BackendError, match=r"TensorRT-RTX [0-9.]+ cannot read loop_step\.onnx: .*NoSuchOperator"):
        parsed(standard, library)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_capabilities": ("9.0",)}, r"does not build for compute capability 9\.0; it does for 7\.5, 8\.0"),
        ({"compute_capabilities": ("8.6",), "weights": "fp8"}, r"fp8 needs compute capability 8\.9 or newer, not 8\.6"),
        ({"compute_capabilities": ("7.5",), "weights": "int4"}, r"int4 needs compute capability 8\.0 or newer"),
        ({"timing_cache": Path("timings")}, "times nothing while it builds"),
        ({"max_batch": 99}, "max_batch is 99; the package was exported for 1 to 8"),
    ],
)
def test_options_that_this_library_lacks_are_refused(
    standard: Package, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        build_engine(standard, EngineOptions(**options))  # type: ignore[arg-type]


def test_ctrl_c_stops_a_build_and_leaves_the_package_as_it_was(standard: Package) -> None:
    before = (standard.directory / "manifest.json").read_bytes()

    def stop(step: str, total: int, done: int) -> None:
        if step == "building loop_step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(standard, EngineOptions(), stop)
    assert (standard.directory / "manifest.json").read_bytes() == before
    assert not (standard.directory / "engines").exists()


def test_a_signal_in_the_middle_of_a_build_waits_for_the_builder(standard: Package) -> None:
    sent = []

    def interrupt(step: str, total: int, done: int) -> None:
        if step == "building loop_step" and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engine(standard, EngineOptions(), interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (standard.directory / "engines").exists()


def test_the_build_reports_how_far_it_is(standard: Package) -> None:
    steps: dict[str, int] = {}

    def note(step: str, total: int, done: int) -> None:
        steps[step] = steps.get(step, 0) + done

    build_engine(standard, EngineOptions(), note)
    assert steps["building loop_step"] == 1000
    assert {"reading embed", "building embed", "hashing lm_head"} <= steps.keys()


def test_melt_run_builds_an_engine_and_shows_it(standard: Package) -> None:
    runner = CliRunner()
    result = runner.invoke(run_app, ["build-engine", str(standard.directory), "--engine", "tensorrt-rtx"])
    assert result.exit_code == 0, result.output
    assert "engine tensorrt-rtx-fp16: tensorrt-rtx " in result.stdout
    shown = runner.invoke(run_app, ["inspect", str(standard.directory)]).stdout
    assert "Engines" in shown


def test_melt_run_refuses_a_package_for_onnx_runtime_in_one_line(tiny_package: Path) -> None:
    result = CliRunner().invoke(run_app, ["build-engine", str(tiny_package), "--engine", "tensorrt-rtx"])
    assert result.exit_code == 2
    assert "--dialect standard" in result.output


def test_melt_export_builds_an_engine_into_a_verified_package(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "package"
    arguments = ["--checkpoint", str(tiny_checkpoint), "--output", str(output), "--precision", "fp16"]
    result = CliRunner().invoke(
        export_app,
        [*arguments, "--verify-tokens", "4", "--engine", "tensorrt-rtx", "--engine-weights", "int4"],
    )
    assert result.exit_code == 0, result.output
    package = Package.open(output)
    assert package.manifest.dialect == "standard"
    assert list(package.manifest.engines) == ["tensorrt-rtx-fp16-int4"]
    parity = describe(package).parity
    assert parity is not None
    assert parity.verdict == "passed"


def test_melt_export_refuses_an_engine_for_the_wrong_dialect_before_it_starts(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "package"
    arguments = ["--checkpoint", str(tiny_checkpoint), "--output", str(output), "--dialect", "onnxruntime"]
    result = CliRunner().invoke(export_app, [*arguments, "--engine", "tensorrt-rtx"])
    assert isinstance(result.exception, ArgumentError)
    assert not output.exists()
