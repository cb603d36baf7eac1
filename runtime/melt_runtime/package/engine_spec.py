"""An engine's manifest entry: how it was built, for which devices, and the hash of each plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..untrusted import FieldError, either, flag, listed, mapping, one_of, optional, record, shown, text, whole
from .files import FileSpec

ENGINES = "engines"  # a package's folder of engines, with a folder for each
FLAVOURS = ("tensorrt", "tensorrt-rtx")
WEIGHTS = ("int4", "int8", "fp8")

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
