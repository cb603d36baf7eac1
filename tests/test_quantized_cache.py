"""Caches in 4 and 8 bits: the numbers themselves, the packages that hold them, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakePackage
from hypothesis import given, settings
from hypothesis import strategies as st
from melt_runtime import ArgumentError, LoopSettings, Runtime
from melt_runtime.package.reader import Package

from melt_export.checkpoint import Checkpoint
from melt_export.errors import ExportError
from melt_export.options import ExportOptions
from melt_export.parity.exact_match import read_problems
from melt_export.parity.report import Limits
from melt_export.parity.verify import verify
from melt_export.quantization.kv_cache import calibrated
from melt_export.quantization.kv_cache_scales import CacheScales, rounded
from melt_export.quantization.options import CacheOptions, WeightOptions
from melt_export.reference.pytorch import reference_of


@pytest.fixture(scope="module")
def checkpoints(make_checkpoint: MakeCheckpoint, make_looplm: MakeCheckpoint) -> dict[str, Path]:
    """A MELT and a LoopLM."""
    return {"melt": make_checkpoint(), "looplm": make_looplm()}


@given(st.sampled_from([4, 8]), st.integers(1, 9), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_rounding_a_row_errs_by_half_a_step_inside_the_range(bits: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, scales = torch.randn(2, rows, 16, generator=generator), torch.rand(2, 1, 16, generator=generator) + 0.5
    values = values.clamp(-(2 ** (bits - 1)) * 0.5, (2 ** (bits - 1) - 1) * 0.5)
    kept = rounded(values, scales, bits)
    assert ((kept - values).abs() <= scales / 2 + 1e-6).all()
    assert torch.equal(rounded(kept, scales, bits), kept)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["melt", "looplm"])
def test_a_package_computes_with_the_rows_it_keeps(
    checkpoints: dict[str, Path], make_package: MakePackage, name: str, kind: str
) -> None:
    package = make_package(checkpoints[name], cache=CacheOptions(kind), max_batch=2)
    report = verify(package, checkpoints[name], tokens=12, limits=Limits())
    assert report.passed, report.failures()
    assert report.quality is not None
    assert report.quality.kl > report.kl_mean  # what the bits cost is more than what the road costs
    assert json.loads((package / "parity.json").read_text())["quality"]["positions"] > 0


def test_fewer_bits_are_fewer_bytes_and_more_of_them_are_better(
    checkpoints: dict[str, Path], make_package: MakePackage
) -> None:
    packages = {
        kind: make_package(checkpoints["melt"], cache=CacheOptions(kind), max_batch=2) for kind in ("int8", "int4")
    }
    plain = Package.open(make_package(checkpoints["melt"], max_batch=2)).manifest
    manifests = {kind: Package.open(path).manifest for kind, path in packages.items()}
    assert [m.cache_bytes(100) for m in (plain, manifests["int8"], manifests["int4"])] == [
        plain.cache_bytes(100) // share for share in (1, 4, 8)
    ]
    quality = {
        kind: verify(path, checkpoints["melt"], tokens=1, limits=Limits()).quality for kind, path in packages.items()
    }
    assert quality["int8"] is not None
    assert quality["int4"] is not None
    assert quality["int8"].kl < quality["int4"].kl / 4


def test_stored_numbers_stand_for_the_rows_of_pytorch(checkpoints: dict[str, Path], make_package: MakePackage) -> None:
    package = Package.open(make_package(checkpoints["melt"], cache=CacheOptions("int4"), max_batch=2))
    cache_scales = CacheScales.of(package)
    assert cache_scales is not None
    driver = Runtime.load(package.directory, backend="onnxruntime").driver(1)
    driver.append([[5, 6, 7]], LoopSettings(2))
    stored = np.stack([driver.state.read(f"value_cache.{layer}", (0, slice(None), slice(3))) for layer in range(2)])
    assert stored.dtype == np.uint8
    values = torch.from_numpy(cache_scales.widened("value", stored))
    assert torch.allclose(rounded(values, cache_scales.values[:, :, None], 4), values)
    assert values.abs().sum() > 0


def test_tokens_that_left_the_loop_keep_their_rows(checkpoints: dict[str, Path], make_package: MakePackage) -> None:
    runtime = Runtime.load(make_package(checkpoints["melt"], cache=CacheOptions("int8"), max_batch=2))
    early, late = LoopSettings(1), LoopSettings(4)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    both, alone = runtime.driver(2), runtime.driver(1)
    together = both.append(prompts, [early, late])
    assert np.array_equal(together[:1], alone.append(prompts[:1], early))


def test_scales_are_those_of_the_rows_of_all_loops(checkpoints: dict[str, Path]) -> None:
    ids = [list(range(2, 34))]
    reference = reference_of(Checkpoint(checkpoints["melt"]).load())
    one, four = (calibrated(reference, ids, loops, 8, 32, 8) for loops in (1, 4))
    assert not torch.allclose(one.values, four.values)
    assert (four.values > 0).all()


def test_weights_and_cache_are_quantized_together(checkpoints: dict[str, Path], make_package: MakePackage) -> None:
    options = {"weights": WeightOptions("int8", method="rtn"), "cache": CacheOptions("int8"), "max_batch": 2}
    package = make_package(checkpoints["melt"], **options)
    assert verify(package, checkpoints["melt"], tokens=4, limits=Limits()).passed


def test_a_cache_that_no_graph_can_hold_is_refused() -> None:
    with pytest.raises(ExportError, match="'int3' is not one of int4, int8"):
        CacheOptions("int3")
    for dialect, precision in (("standard", "fp32"), ("onnxruntime", "fp16")):
        with pytest.raises(ExportError, match="--cache int8 needs the dialect onnxruntime at precision fp32"):
            ExportOptions(precision, dialect, cache=CacheOptions("int8"))


ADDITION = Path(__file__).resolve().parent.parent / "examples" / "addition-melt"


def test_the_quantized_demo_model_still_adds(tmp_path: Path, make_package: MakePackage) -> None:
    problems = (ADDITION.parent / "addition_problems.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(problems), encoding="utf-8")
    package = make_package(ADDITION, cache=CacheOptions("int8"), weights=WeightOptions("int8", method="rtn"))
    quality = verify(package, ADDITION, tokens=1, eval_answers=file).quality
    assert quality is not None
    assert quality.accuracy is not None
    assert quality.accuracy.checkpoint >= 0.9
    assert quality.accuracy.package >= quality.accuracy.checkpoint - 0.1
    assert "of 24 answers exact" in quality.summary()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no line"),
        ("[1]", "line 1 is not a JSON object"),
        ('{"prompt": "1+1="}', "line 1 is not a JSON object"),
    ],
)
def test_problems_that_are_none_are_refused(tiny_package: Path, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ArgumentError, match=message):
        read_problems(file, Package.open(tiny_package))
