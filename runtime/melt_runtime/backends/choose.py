"""Choose the backend for a package: a pure function of the package and the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ArgumentError, BackendError
from ..package.engine_spec import RTX_DEVICES, EngineSpec, fitting_engine, rtx_knows

# By preference. "auto" does not take those in BY_NAME_ONLY.
NAMES = ("tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt-rtx", "onnxruntime")
BY_NAME_ONLY = ("onnxruntime-tensorrt-rtx",)
CUDA_PROVIDER = "CUDAExecutionProvider"
# The first ONNX Runtime whose GroupQueryAttention takes a chunk length per sequence (input 16).
_GROUP_QUERY_ATTENTION = (1, 32)
_NO_DRIVER = "there is no NVIDIA driver with a device here"


@dataclass(frozen=True)
class Environment:
    """The facts about package and machine that decide which backends can run.

    ``dialect``, ``precision``, ``engines``, ``source`` (see ``source_hash``): the package's. ``devices``: compute
    capability of each NVIDIA device by index ("8.9"); empty without a driver. ``libraries``: version of each installed
    TensorRT flavour. ``providers``, ``onnxruntime``: providers and version of the installed ONNX Runtime, or None.
    ``plugin``, ``cuda_bindings``: whether the TensorRT-RTX provider and cuda-bindings are installed.
    """

    dialect: str
    precision: str
    engines: Mapping[str, EngineSpec]
    source: str
    devices: tuple[str, ...] = ()
    libraries: Mapping[str, str] | None = None
    providers: tuple[str, ...] | None = None
    plugin: bool = False
    cuda_bindings: bool = False
    onnxruntime: str | None = None


@dataclass(frozen=True)
class Choice:
    """A backend, whether it can run the package here, and why (not). ``engine``: for tensorrt, the engine."""

    name: str
    usable: bool
    reason: str
    engine: str | None = None


def choices(environment: Environment, device: int = 0) -> tuple[Choice, ...]:
    """Judge every backend, in order of preference."""
    judges = {
        "tensorrt": _tensorrt,
        "onnxruntime-cuda": _cuda,
        "onnxruntime-tensorrt-rtx": _plugin,
        "onnxruntime": _cpu,
    }
    return tuple(judges[name](environment, device) for name in NAMES)


def too_old(dialect: str, onnxruntime: str | None) -> str | None:
    """Return why this ONNX Runtime version cannot load a dialect's graphs, or None."""
    if dialect != "onnxruntime" or onnxruntime is None:
        return None
    numbers = tuple(int(number) for number in re.findall(r"\d+", onnxruntime)[:2])
    if numbers >= _GROUP_QUERY_ATTENTION:
        return None
    needed = ".".join(map(str, _GROUP_QUERY_ATTENTION))
    return (
        f"the onnxruntime dialect needs ONNX Runtime {needed} or newer, here is {onnxruntime}; "
        "install a newer one, or export with --dialect standard"
    )


def ranked(environment: Environment, name: str = "auto", device: int = 0) -> tuple[Choice, ...]:
    """Return the backends to try, in order: the named one, or for "auto" all that can run.

    Raises ArgumentError for an unknown name or a device below 0, BackendError if none can run.
    """
    if name != "auto" and name not in NAMES:
        raise ArgumentError(f"backend {name!r} is not one of auto, {', '.join(NAMES)}")
    if isinstance(device, bool) or not isinstance(device, int) or device < 0:
        raise ArgumentError(f"device is {device!r}; it must be a whole number from 0")
    found = choices(environment, device)
    if name == "auto":
        usable = tuple(c for c in found if c.usable and c.name not in BY_NAME_ONLY)
        if not usable:
            raise BackendError(f"nothing here can run this package; {_why_not(found)}")
        return usable
    chosen = next(c for c in found if c.name == name)
    if not chosen.usable:
        raise BackendError(f"{name} cannot run this package here: {chosen.reason}")
    return (chosen,)


def explain(environment: Environment, chosen: Choice, name: str, device: int, failed: Mapping[str, str]) -> str:
    """Return a sentence on why this backend runs. ``failed``: errors of those tried before it."""
    if name != "auto":
        return f"asked for by name; {chosen.reason}"
    before = choices(environment, device)[: NAMES.index(chosen.name)]
    passed = [Choice(c.name, False, failed.get(c.name, c.reason)) for c in before if c.name not in BY_NAME_ONLY]
    return f"{chosen.reason}; {_why_not(tuple(passed))}" if passed else chosen.reason


def _why_not(found: tuple[Choice, ...]) -> str:
    names: dict[str, list[str]] = {}
    for choice in found:
        names.setdefault(choice.reason, []).append(choice.name)
    return "; ".join(f"not {' or '.join(group)}: {reason}" for reason, group in names.items())


def _tensorrt(environment: Environment, device: int) -> Choice:
    missing = _no_device(environment, device)
    if missing:
        return _no("tensorrt", missing)
    if not environment.engines:
        return _no("tensorrt", "the package has no engine (melt-run build-engine builds one)")
    fitting, wrong = fitting_engine(
        environment.engines, environment.source, environment.libraries or {}, environment.devices[device]
    )
    if fitting is None:
        return _no("tensorrt", "; ".join(f"engine {name} {reason}" for name, reason in wrong.items()))
    if not environment.cuda_bindings:
        return _no("tensorrt", "cuda-bindings is not installed; install it with: pip install 'melt-export[tensorrt]'")
    spec = environment.engines[fitting]
    reason = (
        f"engine {fitting} is for {spec.flavour} {spec.version} and compute capability {environment.devices[device]}"
    )
    return Choice("tensorrt", True, reason, fitting)


def _cuda(environment: Environment, device: int) -> Choice:
    name = "onnxruntime-cuda"
    install = "install it with: pip install 'melt-export[gpu]', after pip uninstall onnxruntime"
    missing = _no_device(environment, device)
    if missing:
        return _no(name, missing)
    if environment.providers is None:
        return _no(name, "ONNX Runtime is not installed; install it with: pip install 'melt-export[gpu]'")
    if CUDA_PROVIDER not in environment.providers:
        return _no(name, f"this ONNX Runtime has no CUDA provider; {install}")
    old = too_old(environment.dialect, environment.onnxruntime)
    if old:
        return _no(name, old)
    if environment.dialect == "onnxruntime" and environment.precision == "fp32":
        way = "export with --precision fp16, or with --dialect standard"
        return _no(name, f"GroupQueryAttention has CUDA kernels for fp16 and bf16, not for fp32; {way}")
    if not environment.cuda_bindings:
        return _no(name, "cuda-bindings is not installed; install it with: pip install 'melt-export[gpu]'")
    return Choice(name, True, f"ONNX Runtime has its CUDA provider, and device {device} is there")


def _plugin(environment: Environment, device: int) -> Choice:
    name, extra = "onnxruntime-tensorrt-rtx", "pip install 'melt-export[onnxruntime-tensorrt-rtx]'"
    missing = _no_device(environment, device)
    if missing:
        return _no(name, missing)
    if environment.providers is None:
        return _no(name, f"ONNX Runtime is not installed; install it with: {extra}")
    if not environment.plugin:
        return _no(name, f"ONNX Runtime's TensorRT-RTX provider is not installed; install it with: {extra}")
    if environment.dialect == "onnxruntime":
        return _no(
            name, "GroupQueryAttention is ONNX Runtime's own operator; export with --dialect standard or portable"
        )
    if not rtx_knows(environment.devices[device]):
        capability = environment.devices[device]
        return _no(name, f"the TensorRT-RTX provider is for compute capability {RTX_DEVICES}; this has {capability}")
    if not environment.cuda_bindings:
        return _no(name, f"cuda-bindings is not installed; install it with: {extra}")
    return Choice(name, True, "it compiles the graphs for this device when they are loaded; only by name")


def _cpu(environment: Environment, device: int) -> Choice:
    if environment.providers is None:
        return _no("onnxruntime", "ONNX Runtime is not installed; install it with: pip install 'melt-export[cpu]'")
    old = too_old(environment.dialect, environment.onnxruntime)
    if old:
        return _no("onnxruntime", old)
    if environment.precision == "bf16":
        way = "export this checkpoint as fp32 or fp16"
        return _no("onnxruntime", f"ONNX Runtime has no bf16 kernels for the CPU; {way}")
    return Choice("onnxruntime", True, "ONNX Runtime runs it on the CPU")


def _no_device(environment: Environment, device: int) -> str | None:
    if not environment.devices:
        return _NO_DRIVER
    if device >= len(environment.devices):
        return f"there is no device {device}; the driver knows {len(environment.devices)}, from 0"
    return None


def _no(name: str, reason: str) -> Choice:
    return Choice(name, False, reason)
