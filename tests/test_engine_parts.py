"""What an engine is made of and how a package keeps it: everything that needs no TensorRT."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from melt_runtime import BackendError, Package, PackageError
from melt_runtime.cli.inspect import describe
from melt_runtime.engines.build import EngineOptions, check_options
from melt_runtime.engines.library import Library, open_library
from melt_runtime.engines.monitor import Phases
from melt_runtime.engines.network_checks import require_small
from melt_runtime.engines.profiles import bucket_for, length_buckets, make_profiles, profile_for, resolve
from melt_runtime.engines.quantize import bfloat16_bits, fp8, fp8_values, quantize, rounded, worth_it
from melt_runtime.engines.store import keep_engine, new_engine, open_engine, remove_engine
from melt_runtime.errors import ArgumentError
from melt_runtime.package.engine_spec import EngineSpec, plan_path, runs_on
from melt_runtime.package.files import FileSpec, file_hash
from melt_runtime.package.manifest_schema import read_manifest
from melt_runtime.package.onnx_file import read_initializers, read_operators
from melt_runtime.package.reader import manifest_hash, source_hash
from melt_runtime.package.specs import GRAPHS
from onnx import TensorProto, helper
from processes import LIMIT

NAME = "tensorrt-rtx-fp32"


def add_engine(directory: Path, content: bytes = b"plan", **changes: Any) -> EngineSpec:
    """Keeps an engine of made-up plans in a package."""
    manifest = Package.open(directory, check_hashes=False).manifest
    buckets = length_buckets(manifest.cache_rows)
    with new_engine(directory, NAME) as build:
        files = {}
        for graph in GRAPHS:
            plan = build / f"{graph}.plan"
            plan.write_bytes(content + graph.encode())
            files[graph] = FileSpec(file_hash(plan), plan.stat().st_size)
        spec = EngineSpec(
            flavour="tensorrt-rtx",
            version="1.7.1",
            compute_capabilities=(),
            precision="fp32",
            weights=None,
            dialect="standard",
            profiles=make_profiles(manifest.max_batch, manifest.chunk, 4, buckets),
            buckets=buckets,
            options={"workspace": 512, "compute_capability": []},
            source=source_hash(manifest),
            files=files,
        )
        spec = replace(spec, **changes)
        keep_engine(directory, NAME, build, spec)
    return spec


def test_an_engine_survives_the_manifest(package_copy: Path) -> None:
    spec = add_engine(package_copy)
    manifest = Package.open(package_copy).manifest
    assert manifest.engines == {NAME: spec}
    assert read_manifest(manifest.to_json()) == manifest


def test_an_engine_changes_nothing_else_in_the_manifest(package_copy: Path) -> None:
    before = (package_copy / "manifest.json").read_bytes()
    verified = manifest_hash(package_copy)
    assert verified == file_hash(package_copy / "manifest.json")
    add_engine(package_copy)
    assert manifest_hash(package_copy) == verified
    remove_engine(package_copy, NAME)
    assert (package_copy / "manifest.json").read_bytes() == before
    assert not (package_copy / "engines" / NAME).exists()


def test_a_package_opens_although_its_engine_is_gone(package_copy: Path) -> None:
    add_engine(package_copy)
    shutil.rmtree(package_copy / "engines")
    with pytest.raises(PackageError, match=r"lacks .*embed\.plan.*melt-run build-engine"):
        open_engine(Package.open(package_copy), NAME)


def test_a_kept_engine_opens_with_its_plans(package_copy: Path) -> None:
    add_engine(package_copy)
    plans = open_engine(Package.open(package_copy), NAME, flavour="tensorrt-rtx", version="1.7.1", capability="8.9")
    assert [path.name for path in plans.values()] == ["embed.plan", "loop_step.plan", "lm_head.plan"]


def test_a_new_engine_takes_the_place_of_the_old(package_copy: Path) -> None:
    add_engine(package_copy, b"old")
    add_engine(package_copy, b"new")
    plans = open_engine(Package.open(package_copy), NAME)
    assert plans["embed"].read_bytes() == b"newembed"
    assert [path.name for path in (package_copy / "engines").iterdir()] == [NAME]


def test_a_build_that_fails_leaves_nothing_behind(package_copy: Path) -> None:
    with suppress(RuntimeError), new_engine(package_copy, NAME) as build:
        (build / "embed.plan").write_bytes(b"half")
        raise RuntimeError("stopped")
    assert not (package_copy / "engines").exists()


def test_a_manifest_that_cannot_be_written_leaves_the_old_engine(
    package_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_engine(package_copy, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("melt_runtime.engines.store._edit_manifest", full)
    with pytest.raises(OSError, match="No space"):
        add_engine(package_copy, b"new")
    assert open_engine(Package.open(package_copy), NAME)["embed"].read_bytes() == b"oldembed"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"version": "1.8.0"}, r"built with tensorrt-rtx 1\.7\.1, here is 1\.8\.0"),
        ({"flavour": "tensorrt"}, "is for tensorrt-rtx, not tensorrt"),
        ({"capability": "7.5"}, r"compute capability 8.0, 8.6, 8.9, 12.0 and newer, this device has 7\.5"),
    ],
)
def test_another_library_or_device_is_refused_with_the_command_that_rebuilds(
    package_copy: Path, asked: dict[str, str], message: str
) -> None:
    add_engine(package_copy)
    with pytest.raises(BackendError, match=f"{message}; build it again with: melt-run build-engine .* --workspace 512"):
        open_engine(Package.open(package_copy), NAME, **asked)


def test_a_changed_byte_in_a_plan_is_found(package_copy: Path) -> None:
    add_engine(package_copy)
    plan = plan_path(package_copy, NAME, "loop_step")
    plan.write_bytes(plan.read_bytes().replace(b"l", b"L", 1))
    with pytest.raises(PackageError, match=r"loop_step\.plan was changed.*melt-run build-engine"):
        open_engine(Package.open(package_copy), NAME)


def test_an_engine_of_other_weights_is_refused(package_copy: Path) -> None:
    add_engine(package_copy, source="0" * 64)
    with pytest.raises(PackageError, match="built from other graphs or weights"):
        open_engine(Package.open(package_copy), NAME)


def test_an_unknown_engine_is_named_with_those_there_are(package_copy: Path) -> None:
    add_engine(package_copy)
    with pytest.raises(PackageError, match=f"no engine 'other': it has {NAME}"):
        open_engine(Package.open(package_copy), "other")


@pytest.mark.parametrize(
    ("field", "value"),
    [("flavour", "other"), ("profiles", []), ("buckets", [0]), ("files", {"../x": {"sha256": "", "bytes": 1}})],
)
def test_a_malformed_engine_entry_is_refused(package_copy: Path, field: str, value: object) -> None:
    add_engine(package_copy)
    path = package_copy / "manifest.json"
    content = json.loads(path.read_text())
    content["engines"][NAME][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(PackageError, match=rf"manifest\.json: .*engines\.{NAME}\.{field}"):
        Package.open(package_copy)


def test_an_engine_without_listed_devices_is_for_ampere_and_newer_but_not_for_an_h100(
    package_copy: Path,
) -> None:
    spec = add_engine(package_copy)
    found = {device: runs_on(spec, device) for device in ("7.5", "8.0", "8.9", "9.0", "10.3", "12.0", "12.1")}
    assert [device for device, fits in found.items() if fits] == ["8.0", "8.9", "12.0", "12.1"]
    assert [runs_on(replace(spec, compute_capabilities=("7.5",)), d) for d in ("7.5", "8.0")] == [True, False]


def test_the_facts_of_a_package_name_its_engines(package_copy: Path) -> None:
    spec = add_engine(package_copy)
    assert describe(Package.open(package_copy)).engines == {NAME: spec}


@pytest.mark.parametrize("rows", [1, 64, 80, 264, 4096, 4224])
def test_buckets_grow_to_the_whole_cache_and_waste_less_than_half(rows: int) -> None:
    buckets = length_buckets(rows)
    assert buckets[-1] == rows
    assert list(buckets) == sorted(set(buckets))
    for length in range(65, rows + 1):
        assert length <= bucket_for(buckets, length) <= length * 1.5


def test_a_length_beyond_the_cache_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"81 tokens are more than the engine's 80 cache positions"):
        bucket_for(length_buckets(80), 81)


def test_decoding_and_prefill_have_a_profile_each() -> None:
    decode, prefill = make_profiles(8, 128, 16, length_buckets(4096))
    assert (decode.chunk, prefill.chunk, decode.batch) == ((1, 1, 1), (1, 128, 128), (1, 1, 8))
    assert profile_for((decode, prefill), 2, 1, 64) == 0
    assert profile_for((decode, prefill), 2, 5, 4096) == 1
    assert resolve(("batch", 1, "chunk", "context"), prefill)[2] == (8, 1, 128, 4096)


@pytest.mark.parametrize(("lanes", "batch", "chunk"), [((4, 1), (1, 4, 8), (1, 1, 1)), ((1, 4), (1, 1, 8), (1, 4, 4))])
def test_pipelined_runs_have_a_profile_of_their_rows_or_columns(
    lanes: tuple[int, int], batch: tuple[int, ...], chunk: tuple[int, ...]
) -> None:
    profiles = make_profiles(8, 128, 16, length_buckets(4096), lanes)
    assert [profile.name for profile in profiles] == ["decode", "pipelined", "prefill"]
    assert (profiles[1].batch, profiles[1].chunk) == (batch, chunk)
    assert profile_for(profiles, *lanes, 64, pipelined=True) == 1
    assert profile_for(profiles, 1, 1, 64) == 0
    assert profile_for(profiles, 2, 5, 4096, pipelined=True) == 2
    assert profile_for(make_profiles(8, 128, 16, length_buckets(4096)), *lanes, 64, pipelined=True) in (0, 1)
    assert len(make_profiles(2, 2, 16, length_buckets(4096), lanes)) == 2  # the engine holds no whole run


def test_a_package_that_runs_token_by_token_has_one_profile() -> None:
    assert len(make_profiles(1, 1, 16, (64,))) == 1


def test_sizes_above_every_profile_are_refused() -> None:
    profiles = make_profiles(8, 128, 16, length_buckets(4096))
    with pytest.raises(ArgumentError, match=r"batch 9, chunk 1 .* batch 8, chunk 128 and 4096 positions"):
        profile_for(profiles, 9, 1, 64)


@pytest.mark.parametrize(("inputs", "block"), [(256, 128), (96, 32)])
def test_int4_weights_mean_what_onnx_says_they_mean(inputs: int, block: int) -> None:
    from onnx.reference import ReferenceEvaluator

    weight = np.random.default_rng(0).normal(size=(inputs, 48)).astype(np.float32)
    stored = quantize(weight, "int4", "float16")
    assert stored.scales.shape == (inputs // block, 48)
    tensors = [
        helper.make_tensor("w", TensorProto.INT4, weight.shape, stored.data.tobytes(), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT, stored.scales.shape, stored.scales.tobytes(), raw=True),
    ]
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=0, block_size=block)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, weight.shape)
    model = helper.make_model(
        helper.make_graph([node], "g", [], [output], tensors), opset_imports=[helper.make_opsetid("", 21)]
    )
    (back,) = ReferenceEvaluator(model).run(None, {})
    assert np.all(np.abs(back - weight) <= 0.51 * np.repeat(stored.scales, block, axis=0))


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.005), ("fp8", 0.04)])
def test_weights_of_eight_bits_stay_close(kind: str, error: float) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    stored = quantize(weight, kind, "bfloat16")
    values = stored.data.view(np.int8 if kind == "int8" else ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.linalg.norm(values * stored.scales - weight) < error * np.linalg.norm(weight) * 2


def test_a_weight_of_zeros_stays_zero() -> None:
    for kind in ("int4", "int8", "fp8"):
        assert not quantize(np.zeros((128, 32), np.float32), kind, "float16").data.any()


def test_the_rounding_to_short_formats_is_to_nearest_even() -> None:
    values = np.random.default_rng(0).normal(size=4096).astype(np.float32) * 100
    assert np.array_equal(rounded(values, "bfloat16"), values.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert np.array_equal(bfloat16_bits(values), values.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.array_equal(fp8_values(), np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert np.array_equal(fp8(values), values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_vectors_and_odd_sizes_are_not_quantized() -> None:
    assert worth_it((2048, 5632), "int4")
    assert not worth_it((2048, 1), "int4")
    assert not worth_it((100, 64), "int4")
    assert worth_it((100, 64), "int8")


@pytest.mark.parametrize("graph", GRAPHS)
def test_an_onnx_file_is_read_without_onnx_as_onnx_reads_it(tiny_package: Path, graph: str) -> None:
    path = tiny_package / f"{graph}.onnx"
    model = onnx.load(path)
    wanted = {
        t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT
    }
    found = read_initializers(path)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.array_equal(found[name].read(), values)
        assert found[name].bytes == values.nbytes
    nodes = [(node.op_type, node.name, tuple(node.input)) for node in model.graph.node]
    assert [(o.kind, o.name, o.inputs) for o in read_operators(path)] == nodes


def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"\x3f\x01not protobuf")
    with pytest.raises(PackageError, match="not an ONNX file"):
        read_initializers(path)


def test_a_plan_whose_weights_were_widened_is_refused() -> None:
    require_small(800 << 20, 750 << 20, 2000 << 20, "int4")
    with pytest.raises(BackendError, match="did not stay int4"):
        require_small(2700 << 20, 750 << 20, 2000 << 20, "int4")


def test_nested_phases_add_up_to_one() -> None:
    phases, seen = Phases(), []
    phases.start("build", None, 2)
    for part in ("a", "b"):
        phases.start(part, "build", 4)
        for step in range(4):
            phases.step(part, step)
            seen.append(phases.reached)
        phases.finish(part)
        phases.step("build", "ab".index(part))
    assert seen == sorted(seen)
    assert seen[1] == 0.25
    assert phases.reached == 1.0


class _Old:
    """What matters of a TensorRT from before 10.15."""

    __version__ = "10.3.0"

    class LayerType:
        CONSTANT = 0

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    class DataType:
        HALF = 1

    class BuilderFlag:
        TF32 = 0


@pytest.mark.parametrize(
    ("dialect", "precision", "options", "message"),
    [
        ("onnxruntime", "fp16", {}, "--dialect standard"),
        ("standard", "fp16", {}, r"TensorRT 10\.3\.0 cannot update caches.*--dialect portable"),
        ("portable", "fp32", {"weights": "int4"}, "int4 weights are multiplied in fp16 or bf16"),
        ("portable", "fp16", {"weights": "fp8"}, "has no fp8"),
        ("portable", "fp16", {"max_batch": 9}, "max_batch is 9; the package was exported for 1 to 8"),
        ("portable", "fp16", {"compute_capabilities": ("8.9",)}, "builds for the device it runs on"),
        ("portable", "fp16", {"weight_streaming": True}, "no weight streaming"),
    ],
)
def test_what_cannot_be_built_is_refused_before_it_is_tried(
    dialect: str, precision: str, options: dict[str, Any], message: str
) -> None:
    library = Library("tensorrt", _Old)
    with pytest.raises((BackendError, ArgumentError), match=message):
        check_options(dialect, precision, 8, EngineOptions("tensorrt", **options), library)


def test_the_portable_dialect_is_for_old_tensorrt() -> None:
    check_options("portable", "fp16", 8, EngineOptions("tensorrt"), Library("tensorrt", _Old))


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_library_names_its_extra(flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, flavour.replace("-", "_"), None)
    with pytest.raises(BackendError, match=rf"pip install 'melt-export\[{flavour}\]'"):
        open_library(flavour)


def test_options_that_make_no_sense_are_refused() -> None:
    for options in ({"weights": "int3"}, {"workspace": 0}):
        with pytest.raises(ArgumentError):
            EngineOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="is not one of tensorrt, tensorrt-rtx"):
        open_library("other")


def test_engines_are_built_without_torch_or_onnx() -> None:
    code = "import sys, melt_runtime.engines.build; print({'torch', 'onnx', 'onnxruntime'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT)
    assert done.stdout == "set()\n"
