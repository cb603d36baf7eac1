"""TensorRT for models with caches per loop and with layers outside their loops.

Engines are built by TensorRT-RTX, which needs no GPU for it. How they are run is shown on a stand-in for the device.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAMILY_SIZES, MakeCheckpoint, MakeFamily, MakePackage
from device_double import HostDevice, add_plans, stand_in
from melt_runtime import LoopSettings, Package, PackageError, Request, Runtime, Scheduler
from melt_runtime.backends.tensorrt import TensorRTBackend
from melt_runtime.engines.build import EngineOptions, build_engine
from melt_runtime.package.specs import DIALECTS
from test_device_state import ControlsOnTheHost, OnStandIn

IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
PROMPTS = [IDS, [5, 6], [40, 2, 7, 7]]
ASKED: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("huginn", "standard", {}),
    ("huginn", "standard", {"share_caches": "last"}),
    ("huginn", "portable", {}),
    ("huginn", "portable", {"share_caches": "last"}),
    ("llama", "standard", {}),
    ("nanbeige", "standard", {}),
    ("nanbeige_skip", "standard", {}),
    ("nanbeige_skip", "portable", {"share_caches": "last"}),
]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """The stand-in, which every TensorRT backend of the test opens."""
    return stand_in(monkeypatch)


def on_device(package: Path, tmp_path: Path, *, graphs: bool = True) -> Runtime:
    """The package in the TensorRT backend, with "engines"."""
    directory = Path(shutil.copytree(package, tmp_path / f"package-{graphs}"))
    add_plans(directory)
    opened = Package.open(directory)
    return Runtime(opened, TensorRTBackend(opened, graphs=graphs), None)


# Engines


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize(("kind", "dialect", "more"), CASES)
def test_a_family_becomes_an_engine_with_a_plan_per_stage(
    kind: str,
    dialect: str,
    more: dict[str, Any],
    precision: str,
    make_family: MakeFamily,
    make_package: MakePackage,
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    source = make_package(make_family(kind), **FAMILY_SIZES, dialect=dialect, precision=precision, **more)
    package = Package.open(Path(shutil.copytree(source, tmp_path / "package")))
    spec = build_engine(package, EngineOptions())
    assert set(spec.files) == set(package.manifest.graphs)
    assert ("coda" in spec.files) == (kind != "nanbeige")
    assert Package.open(package.directory).manifest.engines == {f"tensorrt-rtx-{precision}": spec}


@pytest.mark.parametrize("dialect", ["standard", "portable"])
def test_an_ouro_becomes_an_engine(
    dialect: str, make_looplm: MakeCheckpoint, make_package: MakePackage, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    source = make_package(make_looplm(), dialect=dialect, precision="fp16")
    package = Package.open(Path(shutil.copytree(source, tmp_path / "package")))
    assert set(build_engine(package, EngineOptions(weights="int8")).files) == {"embed", "loop_step", "lm_head"}


def test_layers_of_all_stages_get_small_weights(
    make_family: MakeFamily, make_package: MakePackage, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    wide = {"n_embd": 512, "n_heads": 32, "num_key_value_heads": 32, "intermediate_size": 1024}
    source = make_package(make_family("llama", **wide), **FAMILY_SIZES, dialect="standard", precision="fp16")
    package = Package.open(Path(shutil.copytree(source, tmp_path / "package")))
    plain, small = (build_engine(package, EngineOptions(weights=weights)) for weights in (None, "int4"))
    for graph in ("embed", "loop_step", "coda"):
        assert small.files[graph].bytes < 0.75 * plain.files[graph].bytes, graph


def test_an_engine_without_the_codas_plan_is_refused(
    make_family: MakeFamily, make_package: MakePackage, tmp_path: Path, device: HostDevice
) -> None:
    directory = Path(
        shutil.copytree(make_package(make_family("huginn"), **FAMILY_SIZES, dialect="standard"), tmp_path / "p")
    )
    spec = add_plans(directory)
    add_plans(directory, "fewer", files={name: file for name, file in spec.files.items() if name != "coda"})
    with pytest.raises(PackageError, match="engine fewer has plans for embed, lm_head, loop_step, not for"):
        Package.open(directory)


# How they run


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(("kind", "dialect", "more"), CASES)
def test_tensorrt_gives_the_tokens_of_the_cpu(
    kind: str,
    dialect: str,
    more: dict[str, Any],
    graphs: bool,
    make_family: MakeFamily,
    make_package: MakePackage,
    tmp_path: Path,
    device: HostDevice,
) -> None:
    source = make_package(make_family(kind), **FAMILY_SIZES, dialect=dialect, **more)
    cpu, ours = Runtime.load(source, backend="onnxruntime"), on_device(source, tmp_path, graphs=graphs)
    every: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3, "loops": 2}]
    if cpu.manifest.start:
        every += [{"start_seed": 9}, {"start_state": "zeros"}]
    if more:
        every += [{"loops": 6, "exit_change": 0.3}, {"loops": 6, "exit_kl": 0.1, "exit_same": 3}]
    for options in every:
        asked: list[Any] = [PROMPTS, *PROMPTS]  # as a batch, and alone
        for prompt in asked:
            expected = cpu.generate(prompt, **ASKED, **options, pipeline="off")
            assert ours.generate(prompt, **ASKED, **options, pipeline="off") == expected
    if graphs:
        with ours._states.lease(1) as lease:
            assert lease.driver is not None
            assert lease.driver.state.captured()  # type: ignore[attr-defined]
    session = ours.session(**ASKED)
    session.append(IDS)
    session.generate()
    session.truncate(8)
    session.append(IDS[8:])
    assert session.generate().token_ids == cpu.generate(IDS, **ASKED).token_ids


@pytest.mark.parametrize("dialect", ["standard", "portable"])
def test_states_after_every_loop_are_the_cpus(
    dialect: str, make_family: MakeFamily, make_package: MakePackage, tmp_path: Path, device: HostDevice
) -> None:
    source = make_package(make_family("huginn"), **FAMILY_SIZES, dialect=dialect, share_caches="last")
    cpu, ours = Runtime.load(source, backend="onnxruntime"), on_device(source, tmp_path)
    mine, theirs = (runtime.loops(IDS, start_seed=2) for runtime in (ours, cpu))
    np.testing.assert_allclose(mine.hidden, theirs.hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mine.logits, theirs.logits, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(
    ("kind", "dialect"),
    [(kind, "standard") for kind in ("huginn", "llama", "nanbeige", "nanbeige_skip")] + [("huginn", "portable")],
)
def test_tensorrt_pipelines_with_the_tokens_of_the_cpu(
    kind: str,
    dialect: str,
    graphs: bool,
    make_family: MakeFamily,
    make_package: MakePackage,
    tmp_path: Path,
    device: HostDevice,
) -> None:
    source = make_package(make_family(kind), **FAMILY_SIZES, dialect=dialect, max_batch=12)
    cpu, ours = Runtime.load(source, backend="onnxruntime"), on_device(source, tmp_path, graphs=graphs)
    for options in ({}, {"temperature": 0.8, "seed": 3}):
        for prompt in PROMPTS:
            expected = cpu.generate(prompt, pipeline="on", **ASKED, **options)
            found = ours.generate(prompt, pipeline="on", **ASKED, **options)
            assert found == expected
            assert found.pipeline == expected.pipeline
    with Scheduler(ours, slots=3) as scheduler:
        handles = [scheduler.submit(Request(tuple(p), ours.options(pipeline="on", **ASKED))) for p in PROMPTS]
        results = [handle.result() for handle in handles]
    assert results == [cpu.generate(prompt, pipeline="off", **ASKED) for prompt in PROMPTS]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("dialect", ["standard", "portable"])
def test_tensorrt_pipelines_shared_caches_with_the_tokens_of_the_cpu(
    dialect: str, graphs: bool, make_family: MakeFamily, make_package: MakePackage, tmp_path: Path, device: HostDevice
) -> None:
    source = make_package(make_family("huginn"), **FAMILY_SIZES, dialect=dialect, share_caches="last")
    cpu, ours = Runtime.load(source, backend="onnxruntime"), on_device(source, tmp_path, graphs=graphs)
    for options in ({}, {"temperature": 0.8, "seed": 3, "start_state": "zeros"}):
        for prompt in PROMPTS:
            expected = cpu.generate(prompt, pipeline="on", **ASKED, **options)
            found = ours.generate(prompt, pipeline="on", **ASKED, **options)
            assert found == expected
            assert found.pipeline == expected.pipeline


@pytest.mark.parametrize("backend", [OnStandIn, ControlsOnTheHost])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("kind", "more"), [("huginn", {}), ("nanbeige_skip", {}), ("huginn", {"share_caches": "last"})]
)
def test_onnx_runtime_on_a_device_pipelines_with_the_tokens_of_the_cpu(
    kind: str,
    more: dict[str, Any],
    dialect: str,
    backend: type[OnStandIn],
    make_family: MakeFamily,
    make_package: MakePackage,
) -> None:
    package = make_package(make_family(kind), **FAMILY_SIZES, dialect=dialect, **more)
    cpu, ours = Runtime.load(package), Runtime(Package.open(package), backend(Package.open(package)), None)
    for prompt in PROMPTS:
        expected = cpu.generate(prompt, pipeline="on", **ASKED)
        found = ours.generate(prompt, pipeline="on", **ASKED)
        assert found == expected
        assert found.pipeline == expected.pipeline


def test_a_driver_reads_logits_of_a_chunk_after_the_coda(
    make_family: MakeFamily, make_package: MakePackage, tmp_path: Path, device: HostDevice
) -> None:
    source = make_package(make_family("llama"), **FAMILY_SIZES, dialect="standard")
    cpu, ours = Runtime.load(source, backend="onnxruntime").driver(2), on_device(source, tmp_path).driver(2)
    for tokens in ([IDS, IDS[:4]], [[5], [6]], [[7], []], [[8], [9]]):
        settings = LoopSettings(3, start_seed=1)
        np.testing.assert_allclose(ours.append(tokens, settings), cpu.append(tokens, settings), rtol=1e-4, atol=1e-5)
