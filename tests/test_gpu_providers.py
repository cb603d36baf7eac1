"""What only a machine with an NVIDIA GPU can show. Elsewhere each of these skips and says why."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import Runtime
from melt_runtime.backends.choose import choices, too_old
from melt_runtime.backends.devices import detect_environment, devices, onnxruntime_version
from melt_runtime.package.reader import Package
from melt_runtime.package.specs import DIALECTS
from processes import LIMIT
from test_concurrency import calls_of, together

from melt_export.parity.verify import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not devices(), reason="there is no NVIDIA driver with a device here"),
]
BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"
PROVIDERS = ("onnxruntime-cuda", "onnxruntime-tensorrt-rtx")


def package_for(backend: str, checkpoint: Path, make_package: MakePackage, dialect: str, precision: str) -> Path:
    """A package; skips with the reason where the backend cannot run it here."""
    old = too_old(dialect, onnxruntime_version())
    if old:
        pytest.skip(old)
    package = make_package(checkpoint, dialect=dialect, precision=precision, max_batch=3)
    choice = next(c for c in choices(detect_environment(Package.open(package))) if c.name == backend)
    if not choice.usable:
        pytest.skip(choice.reason)
    return package


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("backend", PROVIDERS)
def test_onnx_runtime_on_a_device_agrees_with_pytorch_at_every_loop(
    make_checkpoint: MakeCheckpoint,
    make_package: MakePackage,
    tmp_path: Path,
    backend: str,
    dialect: str,
    precision: str,
) -> None:
    checkpoint = make_checkpoint()
    package = package_for(backend, checkpoint, make_package, dialect, precision)
    report = verify(shutil.copytree(package, tmp_path / "package"), checkpoint, backend=backend, tokens=16)
    assert report.failures() == []
    assert report.backend == backend


@pytest.mark.parametrize("backend", PROVIDERS)
def test_state_on_a_device_is_allocated_once_for_any_number_of_loops(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, backend: str
) -> None:
    from melt_runtime.backends.cuda import open_device

    package = package_for(backend, make_checkpoint(), make_package, "standard", "fp16")
    runtime, device = Runtime.load(package, backend=backend), open_device()
    runtime.generate([3, 4, 5], max_tokens=4, loops=1)
    before = device.memory()[0]
    runtime.generate([3, 4, 5], max_tokens=4, loops=16)
    assert before - device.memory()[0] < 8 << 20


@pytest.mark.parametrize("backend", PROVIDERS)
def test_calls_of_several_threads_give_what_each_gives_alone_on_a_device(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, backend: str
) -> None:
    package = package_for(backend, make_checkpoint(), make_package, "standard", "fp32")
    calls = calls_of(Runtime.load(package, backend=backend))
    alone = [call() for call in calls]
    for one, rounds in zip(alone, together(calls, 3), strict=True):
        assert rounds == [one] * 3


def test_the_benchmark_passes_on_this_device(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    content = json.loads(file.read_text())
    assert [row for row in content["results"] if row["state"] == "failed"] == []
    assert done.returncode == 0, done.stderr
