"""melt-verify on the backends of a machine: which one runs the package, and what is refused before PyTorch starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePackage
from melt_runtime.backends.choose import CUDA_PROVIDER, Environment
from melt_runtime.backends.devices import devices
from melt_runtime.errors import ArgumentError, BackendError
from melt_runtime.package.reader import Package
from test_backend_choice import ALL, RTX
from typer.testing import CliRunner

from melt_export.cli import verify_app
from melt_export.parity import target as targets
from melt_export.parity import verify as module
from melt_export.parity.target import target_of
from melt_export.parity.verify import verify

without_gpu = pytest.mark.skipif(bool(devices()), reason="there is an NVIDIA device here")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts a package on a machine with these facts."""

    def pretend(package: Path, environment: Environment) -> Package:
        opened = Package.open(package)
        found = replace(environment, dialect=opened.manifest.dialect, precision=opened.manifest.precision)
        monkeypatch.setattr(targets, "detect_environment", lambda package: found)
        return replace(opened, manifest=replace(opened.manifest, engines=environment.engines))

    return pretend


@without_gpu
def test_auto_takes_the_cpu_where_there_is_nothing_better_and_says_so(
    package_copy: Path, tiny_checkpoint: Path
) -> None:
    report = verify(package_copy, tiny_checkpoint, backend="auto", tokens=2)
    written = json.loads((package_copy / "parity.json").read_text())
    assert report.passed
    assert report.backend == written["backend"] == "onnxruntime"
    assert written["arithmetic"] == "ONNX Runtime, CPU"


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_a_bf16_package_that_nothing_here_runs_is_compared_in_float32(
    make_package: MakePackage, tiny_checkpoint: Path, on: Any, backend: str
) -> None:
    package = on(make_package(tiny_checkpoint, precision="bf16"), replace(ALL, devices=(), engines={}))
    target = target_of(package, backend)
    assert target.backend == "onnxruntime"
    with target.comparable(False, lambda *_: None) as (runtime, arithmetic):
        assert runtime.manifest.precision == "fp32"
        assert "float32 arithmetic over the package's bf16 weights" in arithmetic


def test_auto_takes_a_device_that_runs_bf16(make_package: MakePackage, tiny_checkpoint: Path, on: Any) -> None:
    machine = replace(ALL, engines={}, providers=(CUDA_PROVIDER, "CPUExecutionProvider"))
    package = on(make_package(tiny_checkpoint, precision="bf16"), machine)
    assert target_of(package, "auto").backend == "onnxruntime-cuda"


def test_an_engine_is_compared_in_batches_that_it_was_built_for(tiny_package: Path, on: Any) -> None:
    narrow = replace(RTX, profiles=(replace(RTX.profiles[0], batch=(1, 1, 2)),))
    target = target_of(on(tiny_package, replace(ALL, engines={"narrow": narrow})), "tensorrt")
    assert (target.engine, target.max_batch) == ("narrow", 2)


def test_an_engine_that_quantized_the_weights_itself_cannot_be_compared(tiny_package: Path, on: Any) -> None:
    package = on(tiny_package, replace(ALL, engines={"small": replace(RTX, weights="int4")}))
    with pytest.raises(ArgumentError, match="engine small quantized the weights to int4"):
        target_of(package, "tensorrt")
    package = on(tiny_package, replace(ALL, engines={"small": replace(RTX, weights="int4"), "whole": RTX}))
    assert target_of(package, "tensorrt").engine == "whole"


@without_gpu
@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("onnxruntime-cuda", BackendError, "onnxruntime-cuda cannot run this package here: there is no NVIDIA driver"),
        ("tensorrt", BackendError, "tensorrt cannot run this package here: there is no NVIDIA driver"),
        ("abacus", ArgumentError, "backend 'abacus' is not one of auto, tensorrt"),
    ],
)
def test_a_backend_that_cannot_run_here_is_refused_before_pytorch_runs(
    package_copy: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(module, "expected_of", lambda *_, **__: pytest.fail("PyTorch has run"))
    with pytest.raises(error, match=message):
        verify(package_copy, tiny_checkpoint, backend=backend)
    assert not (package_copy / "parity.json").exists()
    command = [str(package_copy), "--checkpoint", str(tiny_checkpoint), "--backend", backend]
    result = CliRunner().invoke(verify_app, command)
    assert message in str(result.exception)


def test_the_command_compares_on_the_backend_that_is_named(package_copy: Path, tiny_checkpoint: Path) -> None:
    command = [str(package_copy), "--checkpoint", str(tiny_checkpoint), "--tokens", "2", "--backend", "onnxruntime"]
    result = CliRunner().invoke(verify_app, command)
    assert result.exit_code == 0, result.output
    assert "compared: ONNX Runtime, CPU" in result.output
