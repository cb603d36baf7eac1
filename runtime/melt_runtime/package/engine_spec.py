"""An engine's manifest entry: how it was built, the hash of each plan, and where it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..untrusted import FieldError, either, flag, listed, mapping, one_of, optional, record, shown, text, whole
from .files import FileSpec

ENGINES = "engines"  # a package's folder of engines, with a folder for each
FLAVOURS = ("tensorrt", "tensorrt-rtx")
WEIGHTS = ("int4", "int8", "fp8")
RTX_DEVICES = "8.0, 8.6, 8.9, 12.0 and newer"  # as TensorRT-RTX states when it refuses others
AGAIN = "build it again"

Range = tuple[int, int, int]


@dataclass(frozen=True)
class ProfileSpec:
    """An optimisation profile: minimum, optimum and maximum of each named dimension."""

    name: str
    batch: Range
    chunk: Range
    context: Range


@dataclass(frozen=True)
class EngineSpec:
    """A TensorRT engine: one plan per graph.

    ``flavour``, ``version``: the library that built it; no other loads it. ``compute_capabilities``: its devices
    ("8.9"); empty means Ampere and newer. ``weights``: stored type of the loop step's weights, None for the package's
    precision. ``buckets``: attention lengths to choose from. ``source``: hash of the graphs and weights it was built
    from. ``files``: by graph, in the engine's folder.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    weights: str | None
    dialect: str
    profiles: tuple[ProfileSpec, ...]
    buckets: tuple[int, ...]
    options: dict[str, Any]
    source: str
    files: dict[str, FileSpec]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain values for JSON."""
        return asdict(self)

    @property
    def bytes(self) -> int:
        """Bytes of all plans."""
        return sum(file.bytes for file in self.files.values())


def plan_path(package: Path, engine: str, graph: str) -> Path:
    """Return the path of an engine's plan for a graph."""
    return package / ENGINES / engine / f"{graph}.plan"


def fitting_engine(
    engines: Mapping[str, EngineSpec], source: str, versions: Mapping[str, str], capability: str
) -> tuple[str | None, dict[str, str]]:
    """Return the engine to run (None: none fits), and why the preferred ones do not.

    ``source``: the package's ``source_hash``. ``versions``: of the installed TensorRT flavours. ``capability``: the
    device's. Engines with the package's own weights come first: they compute what was
    verified.
    """
    wrong: dict[str, str] = {}
    for name in sorted(engines, key=lambda name: engines[name].weights is not None):
        reason = mismatch(engines[name], source, versions.get(engines[name].flavour), capability)
        if reason is None:
            return name, wrong
        wrong[name] = reason
    return None, wrong


def mismatch(
    spec: EngineSpec, source: str, version: str | None, capability: str | None, flavour: str | None = None
) -> str | None:
    """Return why an engine does not fit package, library and device, in words that follow its name; None if it fits.

    ``version``: of its library; None if not installed. ``capability``: None for any device. ``flavour``: the library
    that is to run it; None for its own.
    """
    if flavour is not None and flavour != spec.flavour:
        return f"is for {spec.flavour}, not {flavour}; {AGAIN}"
    if version is None:
        return f"needs {spec.flavour}; install it with: pip install 'melt-export[{spec.flavour}]'"
    if version != spec.version:
        return f"was built with {spec.flavour} {spec.version}, here is {version}; {AGAIN}"
    if capability is not None and not runs_on(spec, capability):
        return f"is for compute capability {devices_of(spec)}, this device has {capability}; {AGAIN}"
    if spec.source != source:
        return f"was built from other graphs or weights than the package has; {AGAIN}"
    return None


def runs_on(spec: EngineSpec, capability: str) -> bool:
    """Return whether an engine is for devices of this compute capability."""
    if spec.compute_capabilities:
        return capability in spec.compute_capabilities
    return rtx_knows(capability)


def rtx_knows(capability: str) -> bool:
    """Return whether TensorRT-RTX 1.7 runs engines without listed devices here: not on 9.0 and 10.x, the data centre
    devices."""
    return 8.0 <= float(capability) < 9.0 or float(capability) >= 12.0


def devices_of(spec: EngineSpec) -> str:
    """Return the compute capabilities that an engine is for, as text."""
    return ", ".join(spec.compute_capabilities) or RTX_DEVICES


def _range(value: Any, where: str) -> Range:
    least, likely, most = listed(whole(), least=3, most=3)(value, where)
    if not least <= likely <= most:
        raise FieldError(f"{where} is {shown(value)}; it must be least, likeliest and most in this order")
    return least, likely, most


ENGINE_NAME = text(128, "[a-z0-9][a-z0-9._-]*")
_WORD = text(128)
_CAPABILITY = text(16, r"[0-9]{1,3}\.[0-9]{1,2}")
_PROFILE = record(ProfileSpec, {"name": _WORD, "batch": _range, "chunk": _range, "context": _range})
_PLAN = record(FileSpec, {"sha256": text(64, "[0-9a-f]{64}"), "bytes": whole(0, 1 << 50)})
_OPTION = either(flag, whole(0), lambda value, where: list(listed(_WORD, most=64)(value, where)), _WORD)
ENGINE = record(
    EngineSpec,
    {
        "flavour": one_of(*FLAVOURS),
        "version": _WORD,
        "compute_capabilities": listed(_CAPABILITY, most=64),
        "precision": _WORD,
        "weights": optional(one_of(*WEIGHTS)),
        "dialect": _WORD,
        "profiles": listed(_PROFILE, least=1, most=16),
        "buckets": listed(whole(), least=1, most=1024),
        "options": mapping(_OPTION, ENGINE_NAME, most=64),
        "source": _WORD,
        "files": mapping(_PLAN, ENGINE_NAME, most=16),
    },
)
