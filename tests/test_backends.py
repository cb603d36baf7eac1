"""Opening a backend: which one it was and why, in Python and in melt-run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from melt_runtime import Runtime
from melt_runtime.backends import open as opening
from melt_runtime.backends.base import Backend
from melt_runtime.backends.choose import NAMES, Choice, Environment
from melt_runtime.backends.devices import devices
from melt_runtime.backends.open import open_backend
from melt_runtime.cli.main import app
from melt_runtime.errors import ArgumentError, BackendError
from melt_runtime.package.reader import Package
from typer.testing import CliRunner

no_gpu = pytest.mark.skipif(bool(devices()), reason="there is an NVIDIA device here")


@no_gpu
def test_a_runtime_says_what_runs_it_and_why(tiny_package: Path) -> None:
    runtime = Runtime.load(tiny_package)
    assert runtime.backend.name == "onnxruntime"
    assert "on the CPU" in runtime.backend_reason
    assert "no NVIDIA driver" in runtime.backend_reason


def test_a_backend_asked_for_by_name_says_so(tiny_package: Path) -> None:
    assert Runtime.load(tiny_package, backend="onnxruntime").backend_reason.startswith("asked for by name")


@no_gpu
@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt-rtx"])
def test_a_backend_that_cannot_run_here_is_refused_with_its_reason(tiny_package: Path, name: str) -> None:
    with pytest.raises(BackendError, match=f"{name} cannot run this package here: there is no NVIDIA driver"):
        Runtime.load(tiny_package, backend=name)


def test_auto_passes_over_what_fails_to_load(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package.open(tiny_package)
    environment = Environment(
        "standard",
        "fp16",
        {},
        "source",
        devices=("8.9",),
        providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
        cuda_bindings=True,
    )
    load = opening._load

    def broken(package: Package, choice: Choice, *rest: object) -> Backend:
        if choice.name == "onnxruntime-cuda":
            raise BackendError("its CUDA libraries cannot be loaded")
        return load(package, choice, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "detect_environment", lambda _: environment)
    monkeypatch.setattr(opening, "_load", broken)
    opened = open_backend(package)
    assert opened.backend.name == "onnxruntime"
    assert "not onnxruntime-cuda: its CUDA libraries cannot be loaded" in opened.reason
    with pytest.raises(BackendError, match="its CUDA libraries"):
        open_backend(package, "onnxruntime-cuda")


def test_low_memory_is_of_the_cpu(tiny_package: Path) -> None:
    package = Package.open(tiny_package)
    assert open_backend(package, low_memory=True).backend.name == "onnxruntime"
    with pytest.raises(ArgumentError, match="low_memory is of the CPU"):
        open_backend(package, "onnxruntime-cuda", low_memory=True)


def test_an_engine_is_for_tensorrt_only(tiny_package: Path) -> None:
    with pytest.raises(ArgumentError, match="only tensorrt runs engines"):
        open_backend(Package.open(tiny_package), "onnxruntime", engine="tensorrt-rtx-fp16")


def test_inspect_lists_every_backend_with_its_reason(tiny_package: Path) -> None:
    facts = json.loads(CliRunner().invoke(app, ["inspect", str(tiny_package), "--json"]).stdout)
    assert [backend["name"] for backend in facts["backends"]] == list(NAMES)
    assert all(backend["reason"] for backend in facts["backends"])
    assert facts["backends"][-1]["usable"] is True
    assert "Backends, here" in CliRunner().invoke(app, ["inspect", str(tiny_package)]).stdout


def test_stats_name_the_backend_and_why(tiny_package: Path) -> None:
    arguments = ["generate", str(tiny_package), "3,4", "--ids", "--max-tokens", "2", "--stats", "--device", "1"]
    assert "backend              onnxruntime (" in CliRunner().invoke(app, arguments).stderr
