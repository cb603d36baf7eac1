"""The head in 4 bits, and the embedding in few: a tied head shares its bytes, and the loss is what parity measures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import Runtime
from melt_runtime.package.reader import Package
from typer.testing import CliRunner

from melt_export.cli import export_app
from melt_export.errors import ExportError
from melt_export.options import ExportOptions
from melt_export.parity.verify import verify
from melt_export.quantization.options import WeightOptions

SHAPE = {"vocab_size": 500, "num_hidden_layers": 1, "total_ut_steps": 2}
PROMPT = [3, 14, 15, 9, 26]


def int4(**options: object) -> WeightOptions:
    return WeightOptions("int4", **{"method": "rtn", **options})  # type: ignore[arg-type]


def operators(package: Path, graph: str) -> list[onnx.NodeProto]:
    return list(onnx.load(package / f"{graph}.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("embedding", [None, "int4", "int8"])
@pytest.mark.parametrize("head", ["int4", "int8"])
def test_a_package_computes_what_its_numbers_stand_for(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, head: str, embedding: str | None, tied: bool
) -> None:
    checkpoint = make_checkpoint(**SHAPE, tie_word_embeddings=tied)
    package = make_package(checkpoint, weights=int4(head=head, embedding=embedding))
    report = verify(package, checkpoint, tokens=6)
    assert [failure for failure in report.failures() if not failure.startswith("quantization")] == []
    (found,) = (state for state in report.states if state.quantity == "embedding")
    assert found.relative < 1e-6
    record = Package.open(package).manifest.weights
    assert (record["head"], record["embedding"]) == (head, embedding or "float16")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_tied_head_in_the_same_bits_shares_the_embeddings_bytes(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, kind: str, method: str
) -> None:
    checkpoint = make_checkpoint(**SHAPE, tie_word_embeddings=True)
    one, two = (
        make_package(checkpoint, weights=int4(head=kind, embedding=embedding, method=method))
        for embedding in (kind, None)
    )
    table = SHAPE["vocab_size"] * 64 * 2  # of the embedding in float16
    assert (two / "weights.data").stat().st_size - (one / "weights.data").stat().st_size == pytest.approx(
        table, rel=0.2
    )
    places = {}
    for graph in ("embed", "lm_head"):
        tensors = onnx.load(one / f"{graph}.onnx", load_external_data=False).graph.initializer
        places[graph] = {
            tensor.name.rpartition(".")[2]: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in tensors
        }
    assert places["embed"] == places["lm_head"]
    assert verify(one, checkpoint, tokens=4).states[-1].quantity == "embedding"


def test_asymmetric_blocks_are_the_heads_alone(make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> None:
    checkpoint = make_checkpoint(**SHAPE, tie_word_embeddings=True)
    package = make_package(checkpoint, weights=int4(head="int4", embedding="int4", asymmetric=True))
    (gather,) = operators(package, "embed")
    assert (gather.op_type, len(gather.input)) == ("GatherBlockQuantized", 3)
    report = verify(package, checkpoint, tokens=4)
    assert [failure for failure in report.failures() if not failure.startswith("quantization")] == []


def test_each_row_is_looked_up_as_it_is_stored(make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> None:
    checkpoint = make_checkpoint(**SHAPE)
    packages = (make_package(checkpoint, weights=int4(embedding=kind)) for kind in ("int8", None))
    exact, half = (Runtime.load(package).driver().state for package in packages)
    rows = []
    for state in (exact, half):
        state.embed(np.array([PROMPT]))
        rows.append(state.read("hidden"))
    error = np.abs(rows[0] - rows[1]).max() / np.abs(rows[1]).max()
    assert 1e-4 < error < 1e-2


def test_what_cannot_be_is_refused(make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> None:
    with pytest.raises(ExportError, match="needs the dialect onnxruntime"):
        ExportOptions(dialect="standard", weights=int4(embedding="int4"))
    with pytest.raises(ExportError, match="embedding 'int2' is not one of int4, int8"):
        int4(embedding="int2")
    checkpoint = make_checkpoint(**SHAPE, hidden_size=40, head_dim=16)
    with pytest.raises(ExportError, match=r"hidden_size is 40, no multiple of a block of 16: leave the embedding"):
        make_package(checkpoint, weights=int4(embedding="int4"))


def test_its_rows_are_whole_blocks_and_a_tied_head_shares_them(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    checkpoint = make_checkpoint(**SHAPE, tie_word_embeddings=True)
    package = make_package(checkpoint, weights=int4(block=128, head="int4", embedding="int4"))
    sizes = [
        attribute.i
        for graph in ("embed", "loop_step", "lm_head")
        for node in operators(package, graph)
        for attribute in node.attribute
        if attribute.name == "block_size"
    ]
    assert sizes[0] == sizes[-1] == 64  # a row has 64 values
    assert set(sizes[1:-1]) == {128}
    report = verify(package, checkpoint, tokens=4)
    assert [failure for failure in report.failures() if not failure.startswith("quantization")] == []


def test_the_command_takes_both_and_says_so(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(**SHAPE, tie_word_embeddings=True)
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--no-verify"]
    chosen = ["--weights", "int4", "--method", "rtn", "--head", "int4", "--embedding", "int4"]
    result = CliRunner().invoke(export_app, [*arguments, *chosen])
    assert result.exit_code == 0, result.output
    assert "head int4, embedding int4" in result.output
    result = CliRunner().invoke(export_app, [*arguments, "--head", "int4"])
    assert "--head" in str(result.exception)
