"""A package says whether the tokens of a chunk may be in different loops; packages from before still run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import PackageError, Runtime
from melt_runtime.backends.control import LoopControl
from melt_runtime.package.files import file_hash
from melt_runtime.package.manifest_schema import read_manifest
from melt_runtime.package.reader import Package
from onnx import helper, numpy_helper

DIALECTS = ("onnxruntime", "standard", "portable")
PROMPTS = [[5, 9, 4, 7, 8, 30, 31, 12, 2, 6, 11], [3, 2, 44]]


def per_sequence(package: Path, directory: Path) -> Path:
    """Copy a package with ``first_loop`` per sequence and format version 2, as exports made them before."""
    shutil.copytree(package, directory)
    file = directory / "loop_step.onnx"
    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    given = next(value for value in graph.input if value.name == "first_loop")
    del given.type.tensor_type.shape.dim[1]
    for node in graph.node:
        names = ["first_loop/column" if name == "first_loop" else name for name in node.input]
        node.input[:] = names
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "first_loop/axis"))
    graph.node.insert(0, helper.make_node("Unsqueeze", ["first_loop", "first_loop/axis"], ["first_loop/column"]))
    onnx.save(model, file)

    def edit(content: dict) -> None:
        content["format_version"] = 2
        content["files"][file.name] = {"sha256": file_hash(file), "bytes": file.stat().st_size}
        tensors = content["graphs"]["loop_step"]["inputs"]
        next(tensor for tensor in tensors if tensor["name"] == "first_loop")["shape"] = ["batch"]

    edited(directory, edit)
    return directory


def edited(package: Path, edit: object) -> None:
    path = package / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module", params=DIALECTS)
def package(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> Path:
    """A small package of a dialect."""
    return make_package(make_checkpoint(tokenizer=True), dialect=request.param)


def test_a_package_from_before_runs_plainly_and_gives_the_same_tokens(package: Path, tmp_path: Path) -> None:
    old = per_sequence(package, tmp_path / "old")
    assert Package.open(package).manifest.staggers
    assert not Package.open(old).manifest.staggers
    runtimes = [Runtime.load(path) for path in (package, old)]
    for settings in ({}, {"exit_threshold": 0.4}, {"loops": 6}):
        new, before = (runtime.generate(PROMPTS, max_tokens=24, ignore_eos=True, **settings) for runtime in runtimes)
        assert [(found.token_ids, found.depth) for found in new] == [(found.token_ids, found.depth) for found in before]


def test_the_columns_of_a_chunk_may_be_in_different_loops(package: Path) -> None:
    """What a column computes in its first loop does not depend on the loop that its neighbours are in."""
    state = Runtime.load(package).driver(1).state
    both, counts, lengths = np.ones((1, 2), np.bool_), np.array([2]), np.zeros(1, np.int64)
    state.embed(np.array([[5, 6]]))
    state.loop(LoopControl(np.ones(1, np.bool_), both, lengths, counts))
    first = state.read("hidden")

    def again(first_loop: list[bool]) -> np.ndarray:
        state.embed(np.array([[5, 6]]))
        state.loop(LoopControl(np.array([first_loop]), both, lengths, counts))
        return state.read("hidden")

    mixed = again([True, False])
    np.testing.assert_allclose(mixed[:, 0], first[:, 0], rtol=1e-5, atol=1e-6)
    assert np.abs(mixed[:, 1] - first[:, 1]).max() > 1e-4
    np.testing.assert_array_equal(again([True, True]), first)


def test_lengths_are_written_in_every_run_of_tokens_in_different_loops(package: Path) -> None:
    state = Runtime.load(package).driver(1).state
    both, counts = np.ones((1, 2), np.bool_), np.array([2])
    state.embed(np.array([[5, 6]]))
    for length, first_loop in ((0, both), (1, ~both)):  # a token has left, and none has entered
        state.loop(LoopControl(first_loop, both, np.array([length]), counts))
        assert state.view("lengths", np.dtype(np.int64), (1,)) == [length]


def test_a_manifest_of_another_shape_than_the_graph_is_refused(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)

    def edit(content: dict) -> None:
        tensors = content["graphs"]["loop_step"]["inputs"]
        next(tensor for tensor in tensors if tensor["name"] == "first_loop")["shape"] = ["batch"]

    edited(copy, edit)
    with pytest.raises(PackageError, match="first_loop is bool"):
        Runtime.load(copy, backend="onnxruntime")


@pytest.mark.parametrize("shape", [["chunk"], ["chunk", "batch"], ["batch", "chunk", 1], ["batch", 4]])
def test_any_other_shape_is_refused(package: Path, shape: list[object]) -> None:
    content = json.loads((package / "manifest.json").read_text())
    tensors = content["graphs"]["loop_step"]["inputs"]
    next(tensor for tensor in tensors if tensor["name"] == "first_loop")["shape"] = shape
    with pytest.raises(PackageError, match="first_loop is bool"):
        read_manifest(json.dumps(content))


def test_only_a_melt_of_several_loops_staggers(
    make_checkpoint: MakeCheckpoint, make_looplm: MakeCheckpoint, make_package: MakePackage, tiny_package: Path
) -> None:
    one, looplm = make_package(make_checkpoint(total_ut_steps=1)), make_package(make_looplm(), chunk=8)
    manifests = [Package.open(path).manifest for path in (tiny_package, one, looplm)]
    assert [manifest.staggers for manifest in manifests] == [True, False, False]
    assert [manifest.format_version for manifest in manifests] == [3, 2, 1]
