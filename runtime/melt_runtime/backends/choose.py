"""Which backend runs a package here: a pure function of what the package is and what the machine has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..engines.store import RTX_DEVICES, fitting_engine, rtx_knows
from ..errors import ArgumentError, BackendError
from ..package.engine_spec import EngineSpec

# In the order of preference. What "auto" does not take must be asked for by name.
NAMES = ("tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt-rtx", "onnxruntime")
BY_NAME_ONLY = ("onnxruntime-tensorrt-rtx",)
CUDA_PROVIDER = "CUDAExecutionProvider"
# The first ONNX Runtime whose GroupQueryAttention takes a chunk's own length for each sequence (its input 16).
_GROUP_QUERY_ATTENTION = (1, 32)
_NO_DRIVER = "there is no NVIDIA driver with a device here"


@dataclass(frozen=True)
class Facts:
    """What the choice depends on.

    dialect, precision, engines: the package's; ``source``: the hash of its graphs and weights, as ``source_hash``
    gives it. devices: the compute capability of every NVIDIA device by index ("8.9"), none without a driver.
    libraries: version of each installed TensorRT flavour. providers, onnxruntime: the installed ONNX Runtime's
    providers and version, None without one. plugin, cuda_bindings: whether the TensorRT-RTX provider's package and
    cuda-bindings are installed.
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
    """A backend, whether it could run the package here, and why (not), in a few words; ``engine`` is tensorrt's."""

    name: str
    usable: bool
    reason: str
    engine: str | None = None


def choices(facts: Facts, device: int = 0) -> tuple[Choice, ...]:
    """Every backend, best first."""
    judges = {
        "tensorrt": _tensorrt,
        "onnxruntime-cuda": _cuda,
        "onnxruntime-tensorrt-rtx": _plugin,
        "onnxruntime": _cpu,
    }
    return tuple(judges[name](facts, device) for name in NAMES)


def too_old(dialect: str, onnxruntime: str | None) -> str | None:
    """Why an ONNX Runtime of this version cannot load a dialect's graphs; None where it can or is not there."""
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


def ranked(facts: Facts, name: str = "auto", device: int = 0) -> tuple[Choice, ...]:
    """The backends to try, one after the other: the one that was named, or for "auto" all that could do.

    Raises ArgumentError for an unknown name or a device below 0, BackendError if none could do.
    """
    if name != "auto" and name not in NAMES:
        raise ArgumentError(f"backend {name!r} is not one of auto, {', '.join(NAMES)}")
    if isinstance(device, bool) or not isinstance(device, int) or device < 0:
        raise ArgumentError(f"device is {device!r}; it must be a whole number from 0")
    found = choices(facts, device)
    if name == "auto":
        usable = tuple(c for c in found if c.usable and c.name not in BY_NAME_ONLY)
        if not usable:
            raise BackendError(f"nothing here can run this package; {_why_not(found)}")
        return usable
    chosen = next(c for c in found if c.name == name)
    if not chosen.usable:
        raise BackendError(f"{name} cannot run this package here: {chosen.reason}")
    return (chosen,)


def explain(facts: Facts, chosen: Choice, name: str, device: int, failed: Mapping[str, str]) -> str:
    """Why this one runs, in a sentence. failed: what went wrong with those that were tried before it."""
    if name != "auto":
        return f"asked for by name; {chosen.reason}"
    before = choices(facts, device)[: NAMES.index(chosen.name)]
    passed = [Choice(c.name, False, failed.get(c.name, c.reason)) for c in before if c.name not in BY_NAME_ONLY]
    return f"{chosen.reason}; {_why_not(tuple(passed))}" if passed else chosen.reason


def _why_not(found: tuple[Choice, ...]) -> str:
    names: dict[str, list[str]] = {}
    for choice in found:
        names.setdefault(choice.reason, []).append(choice.name)
    return "; ".join(f"not {' or '.join(group)}: {reason}" for reason, group in names.items())


def _tensorrt(facts: Facts, device: int) -> Choice:
    missing = _no_device(facts, device)
    if missing:
        return _no("tensorrt", missing)
    if not facts.engines:
        return _no("tensorrt", "the package has no engine (melt-run build-engine builds one)")
    fitting, wrong = fitting_engine(facts.engines, facts.source, facts.libraries or {}, facts.devices[device])
    if fitting is None:
        return _no("tensorrt", "; ".join(f"engine {name} {reason}" for name, reason in wrong.items()))
    if not facts.cuda_bindings:
        return _no("tensorrt", "cuda-bindings is not installed; install it with: pip install 'melt-export[tensorrt]'")
    spec = facts.engines[fitting]
    reason = f"engine {fitting} is for {spec.flavour} {spec.version} and compute capability {facts.devices[device]}"
    return Choice("tensorrt", True, reason, fitting)


def _cuda(facts: Facts, device: int) -> Choice:
    name = "onnxruntime-cuda"
    install = "install it with: pip install 'melt-export[gpu]', after pip uninstall onnxruntime"
    missing = _no_device(facts, device)
    if missing:
        return _no(name, missing)
    if facts.providers is None:
        return _no(name, "ONNX Runtime is not installed; install it with: pip install 'melt-export[gpu]'")
    if CUDA_PROVIDER not in facts.providers:
        return _no(name, f"this ONNX Runtime has no CUDA provider; {install}")
    old = too_old(facts.dialect, facts.onnxruntime)
    if old:
        return _no(name, old)
    if facts.dialect == "onnxruntime" and facts.precision == "fp32":
        way = "export with --precision fp16, or with --dialect standard"
        return _no(name, f"GroupQueryAttention has CUDA kernels for fp16 and bf16, not for fp32; {way}")
    if not facts.cuda_bindings:
        return _no(name, "cuda-bindings is not installed; install it with: pip install 'melt-export[gpu]'")
    return Choice(name, True, f"ONNX Runtime has its CUDA provider, and device {device} is there")


def _plugin(facts: Facts, device: int) -> Choice:
    name, extra = "onnxruntime-tensorrt-rtx", "pip install 'melt-export[onnxruntime-tensorrt-rtx]'"
    missing = _no_device(facts, device)
    if missing:
        return _no(name, missing)
    if facts.providers is None:
        return _no(name, f"ONNX Runtime is not installed; install it with: {extra}")
    if not facts.plugin:
        return _no(name, f"ONNX Runtime's TensorRT-RTX provider is not installed; install it with: {extra}")
    if facts.dialect == "onnxruntime":
        return _no(
            name, "GroupQueryAttention is ONNX Runtime's own operator; export with --dialect standard or portable"
        )
    if not rtx_knows(facts.devices[device]):
        capability = facts.devices[device]
        return _no(name, f"the TensorRT-RTX provider is for compute capability {RTX_DEVICES}; this has {capability}")
    if not facts.cuda_bindings:
        return _no(name, f"cuda-bindings is not installed; install it with: {extra}")
    return Choice(name, True, "it compiles the graphs for this device when they are loaded; only by name")


def _cpu(facts: Facts, device: int) -> Choice:
    if facts.providers is None:
        return _no("onnxruntime", "ONNX Runtime is not installed; install it with: pip install 'melt-export[cpu]'")
    old = too_old(facts.dialect, facts.onnxruntime)
    if old:
        return _no("onnxruntime", old)
    if facts.precision == "bf16":
        way = "export this checkpoint as fp32 or fp16"
        return _no("onnxruntime", f"ONNX Runtime has no bf16 kernels for the CPU; {way}")
    return Choice("onnxruntime", True, "ONNX Runtime runs it on the CPU")


def _no_device(facts: Facts, device: int) -> str | None:
    if not facts.devices:
        return _NO_DRIVER
    if device >= len(facts.devices):
        return f"there is no device {device}; the driver knows {len(facts.devices)}, from 0"
    return None


def _no(name: str, reason: str) -> Choice:
    return Choice(name, False, reason)
