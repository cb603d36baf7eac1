"""What runs the models: every backend with every dialect (and engine flavour) it takes, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass

from melt_runtime.backends.choose import choices
from melt_runtime.backends.devices import detect_environment
from melt_runtime.engines.build import EngineOptions, build_engine, check_package, engine_name
from melt_runtime.engines.library import open_library
from melt_runtime.engines.store import remove_engine
from melt_runtime.errors import ArgumentError, MeltError
from melt_runtime.package.engine_spec import FLAVOURS
from melt_runtime.package.reader import Package
from melt_runtime.progress import Step

# The dialects in which a backend is checked; the portable one when it is asked for.
_DIALECTS = {
    "onnxruntime": ("onnxruntime", "standard"),
    "onnxruntime-cuda": ("onnxruntime", "standard"),
    "onnxruntime-tensorrt-rtx": ("standard",),
    "tensorrt": ("standard",),
}
ON_DEVICE = ("onnxruntime-cuda", "onnxruntime-tensorrt-rtx", "tensorrt")


@dataclass(frozen=True)
class Target:
    """A backend, the dialect of the package it runs, and for engines their flavour."""

    backend: str
    dialect: str
    flavour: str | None = None

    @property
    def name(self) -> str:
        """ "tensorrt (tensorrt-rtx), standard"."""
        return f"{self.backend}{f' ({self.flavour})' if self.flavour else ''}, {self.dialect}"


class NotHere(MeltError):
    """A target that cannot run on this machine, and why."""


def targets(backends: tuple[str, ...], portable: bool) -> list[Target]:
    """All that is to be tried. Raises ArgumentError for an unknown backend."""
    found = []
    for backend in backends:
        if backend not in _DIALECTS:
            raise ArgumentError(f"backend {backend!r} is not one of {', '.join(_DIALECTS)}")
        for dialect in _DIALECTS[backend] + (("portable",) if portable else ()):
            flavours = FLAVOURS if backend == "tensorrt" else (None,)
            found += [Target(backend, dialect, flavour) for flavour in flavours]
    return found


def ready(target: Target, package: Package, device: int, progress: Step) -> Package:
    """The package as a target needs it, with an engine built into it for TensorRT.

    Raises NotHere where the machine lacks what is needed; other errors of the family for what should have worked.
    """
    if target.flavour is None:
        _require(target, package, device)
        return package
    options = EngineOptions(target.flavour)
    try:
        check_package(package.manifest, options, open_library(target.flavour))
    except MeltError as error:
        raise NotHere(str(error)) from error
    for name in package.manifest.engines:  # of another flavour: the one that is tested must be the one that runs
        remove_engine(package.directory, name)
    build_engine(package, options, progress)
    built = Package.open(package.directory, check_hashes=False)
    assert engine_name(options, package.manifest.precision) in built.manifest.engines
    _require(target, built, device)
    return built


def _require(target: Target, package: Package, device: int) -> None:
    choice = next(c for c in choices(detect_environment(package), device) if c.name == target.backend)
    if not choice.usable:
        raise NotHere(choice.reason)
