"""What runs a package: a backend owns buffers and execution, and nothing of the model's logic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ArgumentError, BackendError, PackageError
from ..package.reader import Package
from .base import Backend
from .choose import Choice, explain, ranked
from .devices import survey

if TYPE_CHECKING:
    from .tensorrt import TensorRTBackend


@dataclass(frozen=True)
class Opened:
    """A backend that was loaded, and in a sentence why it was that one."""

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
    """Loads a package into a backend by name, or for "auto" into the best one that can run it here.

    threads, low_memory: of the CPU. engine: for TensorRT, by its name in the package (None: the first that fits).
    device: index of the NVIDIA device, where one is used. With "auto" a backend that fails to load is passed over, and
    the reason says why. Raises ArgumentError, BackendError, PackageError.
    """
    if name == "auto" and (low_memory or engine is not None):
        name = "onnxruntime" if low_memory else "tensorrt"
    if low_memory and name != "onnxruntime":
        raise ArgumentError(f"low_memory is of the CPU (backend onnxruntime); {name} keeps the weights on its device")
    if engine is not None and name != "tensorrt":
        raise ArgumentError(f"engine {engine!r} was named for the backend {name}; only tensorrt runs engines")
    if name == "tensorrt":
        # It has the most to say about why not, and what to build again.
        backend = _tensorrt(package, engine, device, check_hashes)
        return Opened(backend, f"asked for by name; engine {backend.engine}")
    facts = survey(package)
    failed: dict[str, str] = {}
    for choice in ranked(facts, name, device):
        try:
            opened = _load(package, choice, device, threads, low_memory, check_hashes)
        except (BackendError, PackageError) as error:
            if name != "auto":
                raise
            failed[choice.name] = str(error)
            continue
        return Opened(opened, explain(facts, choice, name, device, failed))
    tried = "; ".join(f"not {backend}: {reason}" for backend, reason in failed.items())
    raise BackendError(f"nothing here can run this package; {tried}")


def _load(
    package: Package, choice: Choice, device: int, threads: int | None, low_memory: bool, check_hashes: bool
) -> Backend:
    """Imports a backend's module, and with it its library, only when it is the one."""
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
