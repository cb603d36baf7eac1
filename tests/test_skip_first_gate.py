"""A package for ONNX Runtime does not compute the gate in a token's first loop, and nothing else changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import Runtime
from melt_runtime.bench.sweep import loop_bytes
from melt_runtime.decoding.settings import LoopSettings
from melt_runtime.package.reader import Package
from numpy.typing import NDArray

from melt_export.parity.verify import verify


def branches(package: Path) -> list[onnx.GraphProto]:
    """What each layer computes in later loops only."""
    nodes = onnx.load(package / "loop_step.onnx", load_external_data=False).graph.node
    return [
        attribute.g
        for node in nodes
        if node.op_type == "If"
        for attribute in node.attribute
        if attribute.name == "else_branch"
    ]


def products(graph: onnx.GraphProto) -> list[str]:
    return sorted(node.name for node in graph.node if node.op_type in ("MatMul", "MatMulNBits"))


def test_the_gate_of_every_layer_stands_in_a_branch(tiny_package: Path) -> None:
    found = branches(tiny_package)
    names = ["input_proj", "latent_proj"]
    assert [products(graph) for graph in found] == [
        [f"/layers.{layer}/latent_gate/{name}/MatMul" for name in names] for layer in range(2)
    ]


@pytest.mark.parametrize(("aggregation", "latent_init"), [("gate", "zeros"), ("mean", "first_input")])
def test_a_latent_that_does_not_start_as_its_input_is_computed_in_every_loop(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, aggregation: str, latent_init: str
) -> None:
    checkpoint = make_checkpoint(aggregation=aggregation, latent_init=latent_init, num_hidden_layers=1)
    package = make_package(checkpoint)
    assert branches(package) == []
    assert verify(package, checkpoint, tokens=8).failures() == []


def test_a_gate_of_one_column_is_skipped_too_and_the_package_agrees(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    checkpoint = make_checkpoint(aggregation="scalar_gate", num_hidden_layers=1)
    package = make_package(checkpoint)
    assert len(branches(package)) == 1
    assert verify(package, checkpoint, tokens=8).failures() == []


@pytest.fixture
def spoilt_package(tiny_package: Path, tmp_path: Path) -> Path:
    """A package whose gates have no number in them."""
    copy = tmp_path / "package"
    shutil.copytree(tiny_package, copy)
    graph = onnx.load(copy / "loop_step.onnx", load_external_data=False).graph
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if "latent_gate" in tensor.name and tensor.external_data
    ]
    assert len(places) == 4
    with (copy / "weights.data").open("r+b") as file:
        for place in places:
            file.seek(int(place["offset"]))
            file.write(np.full(int(place["length"]) // 4, np.nan, np.float32).tobytes())
    return copy


def test_the_first_loop_reads_nothing_of_the_gate_and_the_second_does(tiny_package: Path, spoilt_package: Path) -> None:
    whole, spoilt = (Runtime.load(path, check_hashes=False).driver() for path in (tiny_package, spoilt_package))
    for loops in (1, 2):
        expected, got = (driver.append([[5, 9, 4]], LoopSettings(loops)) for driver in (whole, spoilt))
        assert np.array_equal(expected, got) is (loops == 1)
        whole.reset()
        spoilt.reset()


def test_sequences_in_different_loops_get_what_each_gets_alone_to_the_last_bit(tiny_package: Path) -> None:
    session = onnxruntime.InferenceSession(tiny_package / "loop_step.onnx", providers=["CPUExecutionProvider"])
    specs = Package.open(tiny_package).manifest.graphs["loop_step"].inputs
    rng = np.random.default_rng(3)

    def value(name: str, dtype: str, shape: tuple[int | str, ...]) -> NDArray[np.generic]:
        sizes = [{"batch": 2, "chunk": 1}.get(size, size) if isinstance(size, str) else size for size in shape]
        first = [[True], [False]]
        fixed = {"first_loop": first, "active": [[True], [True]], "lengths": [4, 4], "chunk_lengths": [1, 1]}
        if name in fixed:
            return np.array(fixed[name], dtype)
        return rng.standard_normal(sizes).astype(dtype)  # type: ignore[arg-type]

    feeds = {spec.name: value(spec.name, spec.dtype, spec.shape) for spec in specs}

    def run(rows: slice) -> dict[str, NDArray[np.generic]]:
        names = [output.name for output in session.get_outputs()]
        part = {name: array[rows] for name, array in feeds.items()}
        return dict(zip(names, session.run(None, part), strict=True))

    together = run(slice(None))
    for row in (0, 1):
        alone = run(slice(row, row + 1))
        for name, array in alone.items():
            np.testing.assert_array_equal(array[0], together[name][row], err_msg=name)


def test_bytes_of_a_loop_leave_the_gate_out_of_the_first(tiny_package: Path) -> None:
    package = Package.open(tiny_package)
    size = package.manifest.model["hidden_size"]
    gates = 2 * (2 * size * size + size) * 4  # of two layers, in float32
    one, four = (loop_bytes(package, 0, loops=loops)["weights"] for loops in (1, 4))
    assert four - one == gates - gates // 4
