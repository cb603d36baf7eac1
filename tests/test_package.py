"""A package that is not exactly what was exported is refused, in one sentence that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from melt_runtime import BackendError, Package, PackageError, Runtime
from melt_runtime.package.manifest_schema import read_manifest


def edit(package: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a package's manifest."""
    path = package / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_manifest_survives_a_round_trip(tiny_package: Path) -> None:
    manifest = Package.open(tiny_package).manifest
    assert read_manifest(manifest.to_json()) == manifest


def test_the_manifest_describes_the_checkpoint(tiny_package: Path) -> None:
    manifest = Package.open(tiny_package).manifest
    assert manifest.loops == 4
    assert manifest.chunk == 8
    assert manifest.max_seq_len == 256
    assert manifest.cache_rows == 256 + 8
    assert manifest.model["hidden_size"] == 64
    assert set(manifest.files) >= {"embed.onnx", "loop_step.onnx", "lm_head.onnx", "weights.data", "tokenizer.json"}
    assert manifest.libraries["onnx"]


def test_a_changed_byte_is_found(package_copy: Path) -> None:
    weights = package_copy / "weights.data"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(PackageError, match=r"weights\.data was changed"):
        Runtime.load(package_copy)


def test_a_truncated_file_is_found_without_hashing(package_copy: Path) -> None:
    weights = package_copy / "weights.data"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(PackageError, match="bytes, its manifest says"):
        Package.open(package_copy, check_hashes=False)


def test_a_missing_file_is_named(package_copy: Path) -> None:
    (package_copy / "lm_head.onnx").unlink()
    with pytest.raises(PackageError, match=r"lacks lm_head\.onnx"):
        Runtime.load(package_copy)


def test_a_newer_format_says_to_update(package_copy: Path) -> None:
    edit(package_copy, lambda m: m.update(format_version=99))
    with pytest.raises(PackageError, match=r"format version 99.*update melt-export"):
        Runtime.load(package_copy)


@pytest.mark.parametrize("name", ["../outside.data", "/etc/hostname", "a/../../b", "..\\b"])
def test_a_path_that_leaves_the_directory_is_refused(package_copy: Path, name: str) -> None:
    edit(package_copy, lambda m: m["files"].update({name: {"sha256": "0", "bytes": 1}}))
    with pytest.raises(PackageError, match="leaves the package directory"):
        Runtime.load(package_copy)


def test_a_link_that_leaves_the_directory_is_refused(package_copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    weights = package_copy / "weights.data"
    weights.rename(outside)
    weights.symlink_to(outside)
    with pytest.raises(PackageError, match="link that leaves"):
        Runtime.load(package_copy)


@pytest.mark.parametrize(
    ("path", "word"), [("nothing-here", "does not exist"), ("file", "is a file"), ("empty", "no manifest.json")]
)
def test_what_is_not_a_package_is_refused(tmp_path: Path, path: str, word: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PackageError, match=word):
        Runtime.load(tmp_path / path)


@pytest.mark.parametrize(
    "change",
    [
        {"loops": 0},
        {"loops": True},
        {"chunk": "8"},
        {"dialect": "klingon"},
        {"precision": "fp3"},
        {"exit_threshold": 7},
        {"exit_threshold": "x"},
        {"model": []},
        {"libraries": None},
        {"states": []},
        {"untrained": [3]},
        {"files": {}},
        {"graphs": {}},
    ],
    ids=str,
)
def test_a_manifest_that_makes_no_sense_is_refused(package_copy: Path, change: dict[str, Any]) -> None:
    edit(package_copy, lambda m: m.update(change))
    with pytest.raises(PackageError, match=r"manifest\.json"):
        Runtime.load(package_copy)


@pytest.mark.parametrize("shape", [["batch", 8], ["batch", "nope", 8, 4], ["batch", 2, -1, 16]], ids=str)
def test_a_state_of_impossible_shape_is_refused(package_copy: Path, shape: list[Any]) -> None:
    edit(package_copy, lambda m: m["states"][3].update(shape=shape))
    with pytest.raises(PackageError, match=r"key_cache\.0"):
        Runtime.load(package_copy)


def test_a_manifest_that_is_not_json_is_refused(package_copy: Path) -> None:
    (package_copy / "manifest.json").write_text("{")
    with pytest.raises(PackageError, match="not JSON"):
        Runtime.load(package_copy)


def test_a_graph_that_is_no_onnx_file_is_refused(package_copy: Path) -> None:
    graph = package_copy / "embed.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    with pytest.raises(PackageError, match=r"embed\.onnx is not an ONNX file"):
        Runtime.load(package_copy, check_hashes=False)


def test_a_graph_that_onnx_runtime_cannot_load_is_reported(package_copy: Path) -> None:
    (package_copy / "embed.onnx").write_bytes(b"\x08\xe7\x07")  # ir_version 999, and no graph
    edit(package_copy, lambda m: m["files"]["embed.onnx"].update(bytes=3))
    with pytest.raises(BackendError, match=r"cannot load embed\.onnx"):
        Runtime.load(package_copy, check_hashes=False)
