"""The backend that runs a package in a comparison, with arithmetic that PyTorch can reproduce."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from melt_runtime import Runtime
from melt_runtime.backends.choose import Choice, ranked
from melt_runtime.backends.devices import detect_environment
from melt_runtime.errors import ArgumentError, BackendError
from melt_runtime.package.files import working_directory
from melt_runtime.package.manifest_facts import activations_of
from melt_runtime.package.reader import Package
from melt_runtime.progress import Step as Progress

from .float32_package import float32_package, wide_package

CPU = "onnxruntime"
_LABELS = {
    "onnxruntime-cuda": "ONNX Runtime, CUDA",
    "onnxruntime-tensorrt-rtx": "ONNX Runtime, TensorRT-RTX",
    "tensorrt": "TensorRT",
}


@dataclass(frozen=True)
class Target:
    """A backend that can run a package here.

    ``device``: index of the NVIDIA device; ``engine``: name of TensorRT's engine.
    """

    package: Package
    backend: str
    device: int = 0
    engine: str | None = None

    @property
    def max_batch(self) -> int:
        """Largest number of sequences in a batch; an engine may allow fewer than the package."""
        most = self.package.manifest.max_batch
        return (
            most if self.engine is None else min(most, self.package.manifest.engines[self.engine].profiles[-1].batch[2])
        )

    @property
    def activations(self) -> str | None:
        """Type of the activations that quantized weights are multiplied with: "int8" or "float"; None without such
        weights."""
        on_cpu = activations_of(self.package.manifest)
        return on_cpu if self.backend == CPU or on_cpu is None else "float"

    def load(self) -> Runtime:
        """Load the package as it is. Raises BackendError, PackageError."""
        return Runtime.load(
            self.package.directory, backend=self.backend, engine=self.engine, device=self.device, check_hashes=False
        )

    @contextmanager
    def comparable(self, low_memory: bool, progress: Progress) -> Iterator[tuple[Runtime, str]]:
        """Load the package, or on the CPU a copy with arithmetic that PyTorch can reproduce. Also yields a description.

        ``low_memory``: leave the CPU's weights on disk, mapped. Raises BackendError, PackageError.
        """
        if self.backend != CPU:
            engine = "" if self.engine is None else f" (engine {self.engine})"
            yield self.load(), f"{_LABELS[self.backend]}, device {self.device}{engine}, as shipped"
            return
        write_copy, how = _copy(self.package)
        if write_copy is None:
            yield _on_cpu(self.package.directory, low_memory), how
            return
        progress("writing a package to compare", 0, 0)
        with working_directory(self.package.directory.parent, ".melt-copy-") as directory:
            write_copy(self.package.directory, directory)
            yield _on_cpu(directory, low_memory), how


def target_of(package: Package, backend: str = CPU, device: int = 0) -> Target:
    """Return the backend that runs a package: the named one, or for "auto" the best that can run here, else the CPU.

    On the CPU a bf16 package is compared by a float32 copy. Raises ArgumentError for an unknown backend and for an
    engine that quantized weights itself, BackendError if the backend cannot run the package here.
    """
    environment = detect_environment(package)
    widened = replace(environment, precision="fp32") if environment.precision == "bf16" else environment
    try:
        chosen = ranked(widened if backend == CPU else environment, backend, device)[0]
    except BackendError:
        if backend != "auto":
            raise
        chosen = ranked(widened, CPU)[0]
    _check_engine(package, chosen)
    return Target(package, chosen.name, device, chosen.engine)


def _check_engine(package: Package, chosen: Choice) -> None:
    """Raise ArgumentError for an engine that quantized the package's weights itself."""
    spec = None if chosen.engine is None else package.manifest.engines[chosen.engine]
    if spec is not None and spec.weights is not None:
        raise ArgumentError(
            f"engine {chosen.engine} quantized the weights to {spec.weights} when it was built, so the package does "
            "not say what it computes with; build one without --weights, or export with --weights"
        )


def _copy(package: Package) -> tuple[Callable[[Path, Path], None] | None, str]:
    """Return the function that writes the copy for the CPU (None: the package itself), and describe its arithmetic."""
    if package.manifest.precision == "bf16":
        return float32_package, "ONNX Runtime, CPU, float32 arithmetic over the package's bf16 weights"
    activations = activations_of(package.manifest)
    if activations == "int8":
        return wide_package, (
            "ONNX Runtime, CPU, quantized weights multiplied with float activations; the package itself multiplies "
            "them with 8-bit activations, which the quality is of"
        )
    if activations == "float":
        return None, "ONNX Runtime, CPU, as shipped: quantized weights multiplied with float activations"
    return None, "ONNX Runtime, CPU"


def _on_cpu(directory: Path, low_memory: bool) -> Runtime:
    return Runtime.load(directory, backend=CPU, check_hashes=False, low_memory=low_memory)
