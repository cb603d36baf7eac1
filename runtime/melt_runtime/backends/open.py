"""Open the backend that runs a package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ArgumentError, BackendError, PackageError
from ..package.reader import Package
from .base import Backend
from .choose import Choice, explain, ranked
from .devices import detect_environment

if TYPE_CHECKING:
    from .tensorrt import TensorRTBackend


@dataclass(frozen=True)
class Opened:
    """A loaded backend, and the sentence that says why it was chosen."""

    backend: Backend
    reason: str


def open_backend(
    package: Package,
    name: str = "auto",
    threads: int | None = None,
    low_memory: bool = False,
    engine: str | None = None,
    device: int = 0,
    check_hashes: bool = True,
) -> Opened:
    """Load a package into the named backend, or for "auto" into the best one that can run it here.

    ``threads``, ``low_memory``: CPU only. ``engine``: TensorRT only, by name (None: the first that fits). ``device``:
    index of the NVIDIA device, if one is used. With "auto" a backend that fails to load is skipped, and the reason says
    why. Raises ArgumentError, BackendError, PackageError.
    """
    if name == "auto" and (low_memory or engine is not None):
        name = "onnxruntime" if low_memory else "tensorrt"
    if low_memory and name != "onnxruntime":
        raise ArgumentError(f"low_memory is of the CPU (backend onnxruntime); {name} keeps the weights on its device")
    if engine is not None and name != "tensorrt":
        raise ArgumentError(f"engine {engine!r} was named for the backend {name}; only tensorrt runs engines")
    if name == "tensorrt":
        # Its own errors say best why not, and what to build again.
        backend = _tensorrt(package, engine, device, check_hashes)
        return Opened(backend, f"asked for by name; engine {backend.engine}")
    environment = detect_environment(package)
    failed: dict[str, str] = {}
    for choice in ranked(environment, name, device):
        try:
            opened = _load(package, choice, device, threads, low_memory, check_hashes)
        except (BackendError, PackageError) as error:
            if name != "auto":
                raise
            failed[choice.name] = str(error)
            continue
        return Opened(opened, explain(environment, choice, name, device, failed))
    tried = "; ".join(f"not {backend}: {reason}" for backend, reason in failed.items())
    raise BackendError(f"nothing here can run this package; {tried}")


def _load(
    package: Package, choice: Choice, device: int, threads: int | None, low_memory: bool, check_hashes: bool
) -> Backend:
    """Load a backend; its module and library are imported only now."""
    if choice.name == "tensorrt":
        return _tensorrt(package, choice.engine, device, check_hashes)
    if choice.name == "onnxruntime":
        from .onnxruntime_cpu import OnnxRuntimeBackend

        return OnnxRuntimeBackend(package, threads, low_memory)
    from .onnxruntime_cuda import CudaBackend, TensorRTRTXBackend

    return (CudaBackend if choice.name == "onnxruntime-cuda" else TensorRTRTXBackend)(package, device)


def _tensorrt(package: Package, engine: str | None, device: int, check_hashes: bool) -> TensorRTBackend:
    from .tensorrt import TensorRTBackend

    return TensorRTBackend(package, engine, device, check_hashes=check_hashes)
