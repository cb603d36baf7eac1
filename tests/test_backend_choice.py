"""Which backend runs a package: decided from plain facts, with a reason for each that cannot."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from melt_runtime.backends.choose import BY_NAME_ONLY, CUDA_PROVIDER, NAMES, Environment, choices, explain, ranked
from melt_runtime.errors import ArgumentError, BackendError
from melt_runtime.machine import ONNX_RUNTIMES, installed_versions
from melt_runtime.package.engine_spec import EngineSpec, ProfileSpec
from melt_runtime.package.specs import DIALECTS, PRECISIONS

RTX = EngineSpec(
    flavour="tensorrt-rtx",
    version="1.7",
    compute_capabilities=("8.9",),
    precision="fp16",
    weights=None,
    dialect="standard",
    profiles=(ProfileSpec("decode", (1, 1, 8), (1, 1, 1), (64, 64, 64)),),
    buckets=(64,),
    options={},
    source="source",
    files={},
)
# A machine on which everything is installed and a package that all of it can run.
ALL = Environment(
    dialect="standard",
    precision="fp16",
    engines={"tensorrt-rtx-fp16": RTX},
    source="source",
    devices=("8.9",),
    libraries={"tensorrt-rtx": "1.7"},
    providers=(CUDA_PROVIDER, "CPUExecutionProvider"),
    plugin=True,
    cuda_bindings=True,
)
ENGINES = [
    {},
    {"a": RTX},
    {"a": replace(RTX, version="1.6")},
    {"a": replace(RTX, compute_capabilities=("12.0",))},
    {"a": replace(RTX, source="another")},
    {"a": replace(RTX, weights="int4"), "b": RTX},
]
MACHINES = list(
    product(
        DIALECTS,
        PRECISIONS,
        ENGINES,
        ["source"],
        [(), ("8.9",), ("7.5", "12.0")],
        [{}, {"tensorrt-rtx": "1.7"}, {"tensorrt": "10.15"}],
        [None, ("CPUExecutionProvider",), (CUDA_PROVIDER, "CPUExecutionProvider")],
        [False, True],
        [False, True],
    )
)


def reason(environment: Environment, name: str, device: int = 0) -> str:
    """Why a backend cannot run the package."""
    found = next(c for c in choices(environment, device) if c.name == name)
    assert not found.usable
    return found.reason


def test_auto_takes_the_first_usable_in_the_order_of_preference_on_every_machine() -> None:
    for combination in MACHINES:
        environment = Environment(*combination)
        for device in (0, 1):
            found = choices(environment, device)
            usable = [c.name for c in found if c.usable and c.name not in BY_NAME_ONLY]
            assert [c.name for c in found] == list(NAMES)
            assert all(c.reason for c in found)
            if usable:
                tried = ranked(environment, "auto", device)
                assert [c.name for c in tried] == usable
                assert explain(environment, tried[0], "auto", device, {})
            else:
                with pytest.raises(BackendError, match="nothing here can run this package"):
                    ranked(environment, "auto", device)


def test_no_backend_on_a_device_is_usable_without_a_driver() -> None:
    for combination in MACHINES:
        environment = replace(Environment(*combination), devices=())
        assert [c.name for c in choices(environment) if c.usable] in ([], ["onnxruntime"])


def test_everything_installed_means_tensorrt() -> None:
    chosen = ranked(ALL)[0]
    assert (chosen.name, chosen.engine) == ("tensorrt", "tensorrt-rtx-fp16")
    text = explain(ALL, chosen, "auto", 0, {})
    assert text == "engine tensorrt-rtx-fp16 is for tensorrt-rtx 1.7 and compute capability 8.9"


def test_without_an_engine_it_is_onnx_runtime_on_cuda_and_says_why_not_tensorrt() -> None:
    environment = replace(ALL, engines={})
    chosen = ranked(environment)[0]
    assert chosen.name == "onnxruntime-cuda"
    assert "not tensorrt: the package has no engine" in explain(environment, chosen, "auto", 0, {})


def test_a_machine_without_a_gpu_runs_on_the_cpu() -> None:
    environment = replace(ALL, devices=(), providers=("CPUExecutionProvider",))
    (chosen,) = ranked(environment)
    assert chosen.name == "onnxruntime"
    text = explain(environment, chosen, "auto", 0, {})
    assert text.endswith("; not tensorrt or onnxruntime-cuda: there is no NVIDIA driver with a device here")


def test_what_failed_to_open_is_in_the_reason_of_what_runs_instead() -> None:
    cpu = ranked(ALL)[-1]
    text = explain(ALL, cpu, "auto", 0, {"tensorrt": "a plan was changed", "onnxruntime-cuda": "out of memory"})
    assert "not tensorrt: a plan was changed; not onnxruntime-cuda: out of memory" in text


def test_an_engine_with_the_packages_own_weights_comes_before_a_smaller_one() -> None:
    environment = replace(ALL, engines={"int4": replace(RTX, weights="int4"), "fp16": RTX})
    assert ranked(environment, "tensorrt")[0].engine == "fp16"
    assert ranked(replace(environment, engines={"int4": replace(RTX, weights="int4")}), "tensorrt")[0].engine == "int4"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"engines": {}}, "build-engine"),
        ({"devices": ()}, "no NVIDIA driver"),
        ({"libraries": {}}, r"pip install 'melt-export\[tensorrt-rtx\]'"),
        ({"libraries": {"tensorrt-rtx": "1.8"}}, "built with tensorrt-rtx 1.7, here is 1.8"),
        ({"devices": ("12.0",)}, "compute capability 8.9, this device has 12.0"),
        ({"source": "another"}, "other graphs or weights"),
        ({"cuda_bindings": False}, "cuda-bindings is not installed"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_with_its_reason(change: dict[str, object], says: str) -> None:
    with pytest.raises(BackendError, match=says):
        ranked(replace(ALL, **change), "tensorrt")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"providers": None}, r"melt-export\[gpu\]"),
        ({"providers": ("CPUExecutionProvider",)}, "no CUDA provider"),
        ({"devices": ()}, "no NVIDIA driver"),
        ({"dialect": "onnxruntime", "precision": "fp32"}, "--precision fp16, or with --dialect standard"),
        ({"cuda_bindings": False}, "cuda-bindings is not installed"),
    ],
)
def test_onnx_runtime_on_cuda_is_refused_with_the_way_out(change: dict[str, object], says: str) -> None:
    with pytest.raises(BackendError, match=says):
        ranked(replace(ALL, **change), "onnxruntime-cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"plugin": False}, r"melt-export\[onnxruntime-tensorrt-rtx\]"),
        ({"dialect": "onnxruntime"}, "--dialect standard or portable"),
        ({"devices": ("7.5",)}, "8.0, 8.6, 8.9, 12.0 and newer"),
        ({"devices": ("9.0",)}, "8.0, 8.6, 8.9, 12.0 and newer"),
        ({"devices": ()}, "no NVIDIA driver"),
    ],
)
def test_the_tensorrt_rtx_provider_is_refused_with_the_way_out(change: dict[str, object], says: str) -> None:
    with pytest.raises(BackendError, match=says):
        ranked(replace(ALL, **change), "onnxruntime-tensorrt-rtx")  # type: ignore[arg-type]


def test_a_cuda_package_in_fp16_runs_in_every_dialect() -> None:
    for dialect in DIALECTS:
        assert ranked(replace(ALL, dialect=dialect), "onnxruntime-cuda")[0].usable


def test_no_cpu_computes_in_bf16() -> None:
    assert "fp32 or fp16" in reason(replace(ALL, precision="bf16"), "onnxruntime")


def test_a_device_that_is_not_there_is_named() -> None:
    assert "no device 3" in reason(ALL, "onnxruntime-cuda", 3)
    assert reason(ALL, "tensorrt", 3).startswith("there is no device 3")


@pytest.mark.parametrize(("name", "device"), [("cuda", 0), ("", 0), ("auto", -1), ("auto", True), ("auto", 1.0)])
def test_an_unknown_backend_or_device_is_refused(name: str, device: int) -> None:
    with pytest.raises(ArgumentError):
        ranked(ALL, name, device)


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-cuda"])
def test_an_onnx_runtime_older_than_the_dialects_operator_is_refused_with_the_way_out(name: str) -> None:
    environment = replace(ALL, dialect="onnxruntime", onnxruntime="1.31.1")
    assert reason(environment, name) == (
        "the onnxruntime dialect needs ONNX Runtime 1.32 or newer, here is 1.31.1; "
        "install a newer one, or export with --dialect standard"
    )
    for fits in (
        replace(environment, onnxruntime="1.32.0"),
        replace(environment, dialect="standard"),
        replace(environment, onnxruntime="2.0"),
    ):
        assert next(c for c in choices(fits) if c.name == name).usable


def test_versions_name_what_is_installed_and_leave_out_the_rest() -> None:
    found = installed_versions(("numpy", *ONNX_RUNTIMES, "no-such-distribution"))
    assert found["numpy"] == np.__version__
    assert set(found) - {"numpy"} <= set(ONNX_RUNTIMES)
    assert set(found) & set(ONNX_RUNTIMES)
