"""Detect the environment that the choice of a backend depends on. Whatever cannot be queried counts as missing."""

from __future__ import annotations

from importlib.util import find_spec

from ..engines.library import current_capability, open_libraries
from ..package.reader import Package, source_hash
from .choose import Environment

PLUGIN_MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
_MOST_DEVICES = 64


def detect_environment(package: Package) -> Environment:
    """Detect what this machine has for a package. TensorRT is imported only if the package has an engine for it."""
    manifest = package.manifest
    libraries = open_libraries(spec.flavour for spec in manifest.engines.values())
    return Environment(
        dialect=manifest.dialect,
        precision=manifest.precision,
        engines=manifest.engines,
        source=source_hash(manifest),
        devices=devices(),
        libraries={flavour: library.version for flavour, library in libraries.items()},
        providers=_providers(),
        plugin=installed(PLUGIN_MODULE),
        cuda_bindings=installed("cuda.bindings"),
        onnxruntime=onnxruntime_version(),
    )


def devices() -> tuple[str, ...]:
    """Return the compute capability of each NVIDIA device by index; empty without a driver."""
    found: list[str] = []
    while len(found) < _MOST_DEVICES and (capability := current_capability(len(found))) is not None:
        found.append(capability)
    return tuple(found)


def installed(module: str) -> bool:
    """Return whether a module can be found, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def onnxruntime_version() -> str | None:
    """Return the version of the installed ONNX Runtime, from any of its distributions."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return str(onnxruntime.__version__)


def _providers() -> tuple[str, ...] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    return tuple(onnxruntime.get_available_providers())
