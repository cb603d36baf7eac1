"""The facts that the choice of a backend rests on, asked of the machine; what fails here is not there."""

from __future__ import annotations

from importlib.util import find_spec

from ..engines.library import current_capability, open_library
from ..errors import MeltError
from ..package.reader import Package, source_hash
from .choose import Facts

PLUGIN_MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
_MOST_DEVICES = 64


def survey(package: Package) -> Facts:
    """What this machine has for a package. TensorRT is imported only where the package has an engine for it."""
    manifest = package.manifest
    return Facts(
        dialect=manifest.dialect,
        precision=manifest.precision,
        engines=manifest.engines,
        source=source_hash(manifest),
        devices=devices(),
        libraries=_libraries({spec.flavour for spec in manifest.engines.values()}),
        providers=_providers(),
        plugin=installed(PLUGIN_MODULE),
        cuda_bindings=installed("cuda.bindings"),
        onnxruntime=onnxruntime_version(),
    )


def devices() -> tuple[str, ...]:
    """The compute capability of every NVIDIA device, by index; none without a driver."""
    found: list[str] = []
    while len(found) < _MOST_DEVICES and (capability := current_capability(len(found))) is not None:
        found.append(capability)
    return tuple(found)


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _libraries(flavours: set[str]) -> dict[str, str]:
    found = {}
    for flavour in flavours:
        try:
            found[flavour] = open_library(flavour).version
        except MeltError:
            continue
    return found


def onnxruntime_version() -> str | None:
    """The version of the ONNX Runtime that is installed here, whichever distribution it came in."""
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
