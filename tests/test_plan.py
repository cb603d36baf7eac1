"""``melt-export --plan``: what an export would write and need, told before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import FAMILY_SIZES, MakeCheckpoint, MakeFamily, MakePackage
from melt_runtime import Package
from typer.testing import CliRunner

from melt_export.checkpoint import Checkpoint
from melt_export.cli import export_app
from melt_export.options import ExportOptions
from melt_export.plan import Plan, plan_export
from melt_export.quantization.options import CacheOptions, WeightOptions

RTN = WeightOptions("int4", method="rtn")


def planned(checkpoint: Path, output: Path, **options: Any) -> Plan:
    return plan_export(Checkpoint(checkpoint), output, ExportOptions(**options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "fp16", "dialect": "standard"},
        {"dialect": "portable", "max_batch": 1},
        {"weights": RTN},
        {"weights": WeightOptions("int8", method="rtn", embedding="int8")},
        {"weights": RTN, "dialect": "standard"},
        {"cache": CacheOptions("int8")},
        {"cache": CacheOptions("int4"), "weights": RTN},
    ],
    ids=lambda options: "-".join(map(str, options)) or "defaults",
)
def test_bytes_of_weights_and_state_are_those_of_the_package(
    make_package: MakePackage, tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    plan = planned(tiny_checkpoint, tmp_path / "package", **options)
    package = Package.open(make_package(tiny_checkpoint, **options))
    stored = package.manifest.files["weights.data"].bytes
    assert stored <= plan.weights_bytes + 4096 * len(package.manifest.graphs)
    assert abs(stored - plan.weights_bytes) < 0.02 * stored
    for batch in (1, package.manifest.max_batch):
        assert plan.state_bytes(package.manifest.max_seq_len, batch) == package.manifest.state_bytes(batch)
        assert plan.state_bytes(32, batch) == package.manifest.resized(32).state_bytes(batch)
    for name in package.manifest.graphs:
        size = package.manifest.files[f"{name}.onnx"].bytes
        assert abs((plan.files[f"{name}.onnx"] or 0) - size) < 0.25 * size
    assert plan.disk_bytes > sum(size.bytes for size in package.manifest.files.values()) * 0.95
    assert set(plan.files) - {"parity.json"} == {*package.manifest.files, "manifest.json"}


@pytest.mark.parametrize("kind", ["huginn", "nanbeige"])
def test_families_are_planned_as_they_are_exported(
    make_family: MakeFamily, make_package: MakePackage, tmp_path: Path, kind: str
) -> None:
    plan = planned(make_family(kind), tmp_path / "package", **FAMILY_SIZES)
    manifest = Package.open(make_package(make_family(kind), **FAMILY_SIZES)).manifest
    assert plan.manifest.states == manifest.states
    assert abs(manifest.files["weights.data"].bytes - plan.weights_bytes) < 4096 * len(manifest.graphs)


def test_weights_in_more_bits_are_planned_for(
    make_package: MakePackage, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(hidden_size=256, intermediate_size=512, tokenizer=True)
    options = {"weights": WeightOptions("int4", int8_share=0.3)}
    plan = planned(checkpoint, tmp_path / "package", **options)
    stored = Package.open(make_package(checkpoint, **options)).manifest.files["weights.data"].bytes
    assert 0.98 * stored <= plan.weights_bytes <= 1.2 * stored


def test_a_plan_writes_nothing_and_says_what_it_would(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "package"
    before = sorted(tiny_checkpoint.rglob("*"))
    result = CliRunner().invoke(export_app, [str(tiny_checkpoint), str(output), "--plan", "--verify-tokens", "9"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    for words in (
        "weights.data", "loop_step.onnx, about", "disk, about",
        "parity.json", "peak memory, about", "time, about", "state, by tokens", "batch 8",
        "after each of 4 loops against PyTorch in float64", "9 greedy tokens for 4 prompts", "staggered decoding",
    ):  # fmt: skip
        assert words in said
    assert list(tmp_path.iterdir()) == []
    assert sorted(tiny_checkpoint.rglob("*")) == before
    skipped = CliRunner().invoke(export_app, [str(tiny_checkpoint), str(output), "--plan", "--no-verify"])
    assert "would compare nothing" in " ".join(skipped.stdout.split())
    assert "parity.json" not in skipped.stdout


def test_a_plan_refuses_what_the_export_would_refuse(
    tiny_checkpoint: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    for arguments in (["--max-seq-len", "999999"], ["--weights", "int4", "--keep", "nothing.like.this"]):
        result = CliRunner().invoke(export_app, [str(tiny_checkpoint), str(tmp_path / "new"), "--plan", *arguments])
        assert result.exit_code != 0
        assert not (tmp_path / "new").exists()


def test_a_plan_that_does_not_fit_says_so(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("melt_export.plan.available_memory", lambda: 1000)
    result = CliRunner().invoke(export_app, [str(tiny_checkpoint), str(tmp_path / "package"), "--plan"])
    assert result.exit_code == 1
    assert "the disk has 1,000 bytes free" in result.stderr
    assert "1,000 bytes of memory are available" in result.stderr


def test_more_loops_need_more_state_only_where_each_has_a_cache(
    make_checkpoint: MakeCheckpoint, make_looplm: MakeCheckpoint, tmp_path: Path
) -> None:
    def state(checkpoint: Path) -> int:
        return planned(checkpoint, tmp_path / "package").state_bytes(64, 1)

    assert state(make_checkpoint(total_ut_steps=4)) == state(make_checkpoint(total_ut_steps=8))
    assert state(make_looplm(total_ut_steps=4)) < state(make_looplm(total_ut_steps=8))
