"""An engine's entry in the manifest: what was built, for what, with what, and the hash of every plan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import FileSpec

ENGINES = "engines"  # the folder in a package; each engine has one of its own in it
FLAVOURS = ("tensorrt", "tensorrt-rtx")
WEIGHTS = ("int4", "int8", "fp8")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

Range = tuple[int, int, int]


@dataclass(frozen=True)
class ProfileSpec:
    """An optimisation profile: least, likeliest and most of each named dimension, and what it is for."""

    name: str
    batch: Range
    chunk: Range
    context: Range


@dataclass(frozen=True)
class EngineSpec:
    """One engine: a plan for each graph.

    ``flavour`` and ``version``: the library that built it, the only one that loads it. ``compute_capabilities``: the
    devices it is for ("8.9"); none of them means Ampere and everything newer. ``weights``: how the loop step's
    products are stored where that is not the package's precision. ``buckets``: the attention lengths the runtime
    chooses from. ``source``: a hash of the graphs and weights it was built from. ``files``: by graph, in the engine's
    folder.
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

    @classmethod
    def from_dict(cls, name: str, content: Mapping[str, Any]) -> EngineSpec:
        """Reads an entry. Raises KeyError, TypeError or ValueError, which name the field at fault."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"engine name {name!r}")
        values = {f.name: content[f.name] for f in fields(cls)}
        values["compute_capabilities"] = tuple(content["compute_capabilities"])
        values["buckets"] = tuple(content["buckets"])
        values["profiles"] = tuple(
            ProfileSpec(p["name"], _range(p["batch"]), _range(p["chunk"]), _range(p["context"]))
            for p in content["profiles"]
        )
        values["files"] = {graph: FileSpec(**spec) for graph, spec in content["files"].items()}
        spec = cls(**values)
        if spec.flavour not in FLAVOURS or (spec.weights is not None and spec.weights not in WEIGHTS):
            raise ValueError(f"flavour {spec.flavour!r} or weights {spec.weights!r} of engine {name}")
        if not all(isinstance(v, str) for v in (*spec.compute_capabilities, spec.version, spec.source)):
            raise TypeError(f"version, source or compute_capabilities of engine {name}")
        if not spec.profiles or not spec.buckets or not all(type(b) is int and b >= 1 for b in spec.buckets):
            raise ValueError(f"profiles or buckets of engine {name}")
        if not isinstance(spec.options, dict) or not all(_NAME.fullmatch(graph) for graph in spec.files):
            raise ValueError(f"options or files of engine {name}")
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain values that ``json`` can write."""
        return asdict(self)

    @property
    def bytes(self) -> int:
        """Bytes of all plans."""
        return sum(file.bytes for file in self.files.values())


def plan_path(package: Path, engine: str, graph: str) -> Path:
    """Where an engine's plan of a graph lies in a package."""
    return package / ENGINES / engine / f"{graph}.plan"


def _range(values: Any) -> Range:
    least, likely, most = values
    if not all(type(v) is int for v in (least, likely, most)) or not 1 <= least <= likely <= most:
        raise ValueError(f"the range {values!r} of a profile")
    return least, likely, most
