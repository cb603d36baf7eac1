"""What only a machine with an NVIDIA GPU can show. Elsewhere each of these skips and says why."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILY_SIZES, MakeCheckpoint, MakeFamily, MakePackage
from melt_runtime import Request, Runtime, Scheduler
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
PROMPTS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9], [5, 6], [40, 2, 7, 7]]
ASKED: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}


def package_for(
    backend: str, checkpoint: Path, make_package: MakePackage, dialect: str, precision: str, **more: Any
) -> Path:
    """A package; skips with the reason where the backend cannot run it here."""
    old = too_old(dialect, onnxruntime_version())
    if old:
        pytest.skip(old)
    package = make_package(checkpoint, dialect=dialect, precision=precision, max_batch=3, **more)
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


@pytest.mark.parametrize("dialect", ["standard", "portable"])
@pytest.mark.parametrize("kind", ["ouro", "huginn", "llama"])
@pytest.mark.parametrize("backend", PROVIDERS)
def test_pipelined_loops_on_a_device_give_the_tokens_of_the_cpu(
    make_looplm: MakeCheckpoint,
    make_family: MakeFamily,
    make_package: MakePackage,
    backend: str,
    kind: str,
    dialect: str,
) -> None:
    checkpoint = make_looplm() if kind == "ouro" else make_family(kind)
    package = package_for(backend, checkpoint, make_package, dialect, "fp32", **FAMILY_SIZES)
    ours, cpu = Runtime.load(package, backend=backend), Runtime.load(package, backend="onnxruntime")
    for options in ({}, {"temperature": 0.8, "seed": 3}, {"loops": 3, "repetition_penalty": 1.3}):
        for prompt in PROMPTS:
            expected = cpu.generate(prompt, pipeline="off", **ASKED, **options)
            assert ours.generate(prompt, pipeline="off", **ASKED, **options) == expected
            found = ours.generate(prompt, pipeline="on", **ASKED, **options)
            assert found == expected
            assert found.pipeline == cpu.generate(prompt, pipeline="on", **ASKED, **options).pipeline


@pytest.mark.parametrize("backend", PROVIDERS)
def test_pipelined_requests_of_a_scheduler_on_a_device_are_as_alone_on_the_cpu(
    make_looplm: MakeCheckpoint, make_package: MakePackage, backend: str
) -> None:
    package = package_for(backend, make_looplm(), make_package, "standard", "fp32", chunk=8)
    ours, cpu = Runtime.load(package, backend=backend), Runtime.load(package, backend="onnxruntime")
    options = ours.options(pipeline="on", **ASKED)
    with Scheduler(ours, slots=3) as scheduler:
        handles = [scheduler.submit(Request(tuple(prompt), options)) for prompt in PROMPTS]
        results = [handle.result() for handle in handles]
    assert results == [cpu.generate(prompt, pipeline="off", **ASKED) for prompt in PROMPTS]


STAGED: list[tuple[str, str, dict[str, Any]]] = [
    ("huginn", "standard", {}),
    ("huginn", "portable", {}),
    ("huginn", "portable", {"share_caches": "last"}),
    ("llama", "standard", {"share_caches": "last"}),
    ("olmo", "standard", {}),
    ("nanbeige", "standard", {}),
    ("nanbeige_skip", "portable", {"share_caches": "last"}),
]


@pytest.mark.parametrize(("kind", "dialect", "more"), STAGED)
@pytest.mark.parametrize("backend", PROVIDERS)
def test_layers_outside_the_loops_on_a_device_give_the_tokens_of_the_cpu(
    make_family: MakeFamily, make_package: MakePackage, backend: str, kind: str, dialect: str, more: dict[str, Any]
) -> None:
    package = package_for(backend, make_family(kind), make_package, dialect, "fp32", **FAMILY_SIZES, **more)
    ours, cpu = Runtime.load(package, backend=backend), Runtime.load(package, backend="onnxruntime")
    for options in ({}, {"temperature": 0.8, "seed": 3, "loops": 2}):
        asked: list[Any] = [*PROMPTS, PROMPTS]  # alone, and as a batch
        for prompt in asked:
            assert ours.generate(prompt, **ASKED, **options) == cpu.generate(prompt, **ASKED, **options)
    session = ours.session(**ASKED)
    session.append(PROMPTS[0])
    session.generate()
    session.truncate(8)
    session.append(PROMPTS[0][8:])
    assert session.generate().token_ids == cpu.generate(PROMPTS[0], **ASKED).token_ids


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("kind", "dialect", "more"), STAGED)
@pytest.mark.parametrize("backend", PROVIDERS)
def test_layers_outside_the_loops_on_a_device_agree_with_pytorch_at_every_loop(
    make_family: MakeFamily,
    make_package: MakePackage,
    tmp_path: Path,
    backend: str,
    kind: str,
    dialect: str,
    more: dict[str, Any],
    precision: str,
) -> None:
    checkpoint = make_family(kind)
    package = package_for(backend, checkpoint, make_package, dialect, precision, **FAMILY_SIZES, **more)
    report = verify(shutil.copytree(package, tmp_path / "package"), checkpoint, backend=backend, tokens=12)
    assert report.failures() == []
    assert report.backend == backend


def test_the_benchmark_passes_on_this_device(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    content = json.loads(file.read_text())
    assert [row for row in content["results"] if row["state"] == "failed"] == []
    assert done.returncode == 0, done.stderr
