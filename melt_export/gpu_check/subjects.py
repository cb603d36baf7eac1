"""The models under test: a checkpoint each, its packages in the dialects that are wanted, and what PyTorch computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from melt_models import MeltConfig
from melt_runtime.package.manifest import Manifest
from melt_runtime.package.reader import Package
from melt_runtime.progress import Step

from ..export import ExportOptions, building
from ..graph.external_weights import external_bytes
from ..parity.expected import Expected, expected_of
from ..random_checkpoint import SHAPES, make


@dataclass(frozen=True)
class Plan:
    """A model to check: its configuration, None for a checkpoint that is given; greedy tokens to compare a prompt."""

    name: str
    precision: str
    config: MeltConfig | None
    rows: int | None
    tokens: int
    max_batch: int = 3


# The shape of the addition demo, whose answers must be the same token for token.
_ADDITION: dict[str, Any] = {
    "vocab_size": 14,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "chunk_size": 16,
    "max_position_embeddings": 256,
    "total_ut_steps": 4,
}
MODELS = ("addition", "ouro-slice")


def plans(names: Iterable[str], quick: bool) -> list[Plan]:
    """The models of its own, by name."""
    layers, vocabulary, rows = (2, 8192, 1024) if quick else (4, 49152, 4096)
    fields = {**SHAPES["ouro-1.4b"].to_dict(), "num_hidden_layers": layers, "vocab_size": vocabulary}
    own = {
        "addition": Plan("addition demo's shape, fp32", "fp32", MeltConfig(**_ADDITION), None, 12 if quick else 48),
        "ouro-slice": Plan(
            f"{layers} layers of Ouro-1.4B's shape, fp16", "fp16", MeltConfig(**fields), rows, 2 if quick else 12
        ),
    }
    return [own[name] for name in names]


@dataclass(frozen=True)
class Subject:
    """A model that is ready: packages by dialect, and what PyTorch has to say about any of them."""

    name: str
    checkpoint: Path
    packages: dict[str, Path]
    manifest: Manifest
    expected: Expected


def prepare(
    plan: Plan, checkpoint: Path | None, dialects: Iterable[str], torch_device: str, directory: Path, progress: Step
) -> Subject:
    """Writes a model's checkpoint and packages into a directory and runs PyTorch. Raises MeltError, CheckpointError."""
    if checkpoint is None:
        assert plan.config is not None
        checkpoint = directory / "checkpoint"
        make(checkpoint, plan.config, progress=_named(plan, progress))
    packages = {}
    for dialect in dialects:
        packages[dialect] = directory / dialect
        options = ExportOptions(plan.precision, dialect, plan.rows, plan.max_batch)
        with building(checkpoint, packages[dialect], options, progress=_named(plan, progress, dialect)):
            pass
    manifest = Package.open(next(iter(packages.values())), check_hashes=False).manifest
    expected = expected_of(checkpoint, manifest, plan.tokens, device=torch_device, progress=_named(plan, progress))
    return Subject(plan.name, checkpoint, packages, manifest, expected)


def weight_bytes(package: Package, graph: str) -> int:
    """Bytes of the large weights that one run of a graph reads, as the package stores them."""
    return external_bytes([ir.load(package.path(graph))])


def _named(plan: Plan, progress: Step, dialect: str = "") -> Step:
    """A progress whose steps say which model they are of."""
    prefix = f"{plan.name}: {dialect + ', ' if dialect else ''}"
    return lambda step, total, done: progress(prefix + step, total, done)
