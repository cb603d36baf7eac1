"""Describe a package by its manifest and file list, without loading a graph."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..backends.choose import Choice, choices
from ..backends.devices import detect_environment
from ..errors import ArgumentError, PackageError
from ..loaded_model import load_tokenizer
from ..package.engine_spec import EngineSpec
from ..package.example_prompt import example_prompt
from ..package.files import within
from ..package.manifest import PARITY
from ..package.manifest_facts import arithmetic_of, exit_of, sharing_of, stages_of, untrained_warnings
from ..package.reader import Package
from ..package.staggered_cost import STAGGERED_COST, StaggeredCost
from ..text.end_tokens import EndToken, end_tokens
from ..untrusted import FieldError, flag, listed, optional, printable, read_object

# The loops shown in the comparison with a LoopLM.
COMPARED_LOOPS = (1, 2, 4, 8, 16)
_TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class FileFacts:
    """A file. ``role``: "graph", "weights" or "text" (tokenizer, templates, settings)."""

    name: str
    role: str
    bytes: int


@dataclass(frozen=True)
class GraphFacts:
    """A graph: its ONNX file with its bytes, and the names of inputs and outputs."""

    name: str
    file: str
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class StateFacts:
    """A state of the loop step. ``bytes``: allocated for a session of the described batch."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int | str, ...]
    bytes: int


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes with ``length`` tokens in each of ``batch`` sequences.

    ``weights_bytes``: as stored. ``state_bytes``: all state of a session, whatever the loops and the length.
    ``cache_bytes``: keys and values of the tokens. ``looplm_cache_bytes``: those of a LoopLM with one cache per loop,
    by number of loops. ``most_loops``: the most that a token may have; None: any number.
    """

    length: int
    batch: int
    weights_bytes: int
    state_bytes: int
    cache_bytes: int
    looplm_cache_bytes: dict[int, int]
    most_loops: int | None


@dataclass(frozen=True)
class ParityFacts:
    """The content of parity.json. ``current``: False if it was written for another manifest. ``problem``: why it cannot
    be read. ``staggered``: None where it was not measured."""

    passed: bool
    current: bool
    failures: tuple[str, ...]
    problem: str | None = None
    staggered: StaggeredCost | None = None

    @property
    def verdict(self) -> str:
        """The outcome in a few words."""
        if self.problem is not None:
            return f"not verified ({self.problem}; verify the package again)"
        if not self.current:
            return "not verified (parity.json is of another export)"
        if self.passed:
            return "passed"
        return "failed: " + (self.failures[0] if self.failures else "no reason given")


@dataclass(frozen=True)
class PackageFacts:
    """All that ``melt-run inspect`` shows. Model sizes missing in the configuration are None.

    ``parity``: None if never verified. ``warnings``: sentences for the user. ``backends``: which backends can run the
    package here, best first, and why others cannot. ``shared_caches``: what sharing caches between loops costs a model
    that was trained without; empty elsewhere. ``exit``: the calibrated criteria by which tokens leave early; empty
    without. ``stages``: what runs once per token, before and after the loops; empty
    where only embedding and head do.
    """

    directory: str
    hash: str
    format_version: int
    dialect: str
    precision: str
    arithmetic: str
    model_type: str | None
    layers: int | None
    hidden_size: int | None
    heads: int | None
    kv_heads: int | None
    vocab_size: int
    loops: int
    exit_threshold: float
    chunk: int
    max_seq_len: int
    max_batch: int
    tokenizer: bool
    chat_template: bool
    end_tokens: tuple[EndToken, ...]
    example_prompt: str | None
    untrained: tuple[str, ...]
    warnings: tuple[str, ...]
    shared_caches: str
    exit: str
    stages: str
    parity: ParityFacts | None
    graphs: tuple[GraphFacts, ...]
    files: tuple[FileFacts, ...]
    states: tuple[StateFacts, ...]
    memory: MemoryFacts
    libraries: dict[str, str]
    engines: dict[str, EngineSpec]
    backends: tuple[Choice, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain values for JSON."""
        return asdict(self)


def describe(package: Package, *, length: int | None = None, batch: int = 1, device: int = 0) -> PackageFacts:
    """Describe an open package. Raises ArgumentError for a length or batch beyond the package's, PackageError.

    ``length``, ``batch``: for its memory, in tokens (None: the most) and sequences. ``device``: index of the NVIDIA
    device for its backends.
    """
    manifest = package.manifest
    length = manifest.max_seq_len if length is None else length
    if not 1 <= length <= manifest.max_seq_len:
        raise ArgumentError(f"length is {length}; this package was exported for 1 to {manifest.max_seq_len} tokens")
    if not 1 <= batch <= manifest.max_batch:
        raise ArgumentError(f"batch is {batch}; this package was exported for 1 to {manifest.max_batch} sequences")
    tokenizer = load_tokenizer(package)
    model = manifest.model
    return PackageFacts(
        directory=str(package.directory),
        hash=package.hash,
        format_version=manifest.format_version,
        dialect=manifest.dialect,
        precision=manifest.precision,
        arithmetic=arithmetic_of(manifest),
        model_type=model.get("model_type"),
        layers=model.get("num_hidden_layers"),
        hidden_size=model.get("hidden_size"),
        heads=model.get("num_attention_heads"),
        kv_heads=model.get("num_key_value_heads"),
        vocab_size=manifest.vocab_size,
        loops=manifest.loops,
        exit_threshold=manifest.exit_threshold,
        chunk=manifest.chunk,
        max_seq_len=manifest.max_seq_len,
        max_batch=manifest.max_batch,
        tokenizer=tokenizer is not None,
        chat_template=tokenizer is not None and tokenizer.has_chat_template,
        end_tokens=end_tokens(package, tokenizer),
        example_prompt=example_prompt(package),
        untrained=manifest.untrained,
        warnings=untrained_warnings(manifest),
        shared_caches=sharing_of(manifest),
        exit=exit_of(manifest),
        stages=stages_of(manifest),
        parity=_parity(package),
        graphs=tuple(
            GraphFacts(
                name,
                graph.file,
                manifest.files[graph.file].bytes,
                tuple(tensor.name for tensor in graph.inputs),
                tuple(tensor.name for tensor in graph.outputs),
            )
            for name, graph in manifest.graphs.items()
        ),
        files=_files(package),
        states=tuple(
            StateFacts(s.input, s.kind, s.dtype, s.shape, s.bytes(batch, manifest.chunk)) for s in manifest.states
        ),
        memory=_memory(package, length, batch),
        libraries=dict(manifest.libraries),
        engines=dict(manifest.engines),
        backends=choices(detect_environment(package), device),
    )


def _files(package: Package) -> tuple[FileFacts, ...]:
    graphs = {graph.file for graph in package.manifest.graphs.values()}

    def role(name: str) -> str:
        if name in graphs:
            return "graph"
        return "text" if name.endswith(_TEXT_SUFFIXES) else "weights"

    return tuple(FileFacts(name, role(name), spec.bytes) for name, spec in package.manifest.files.items())


def _memory(package: Package, length: int, batch: int) -> MemoryFacts:
    manifest = package.manifest
    once, per_loop = manifest.cache_bytes_once(length, batch), manifest.cache_bytes_per_loop(length, batch)
    return MemoryFacts(
        length=length,
        batch=batch,
        weights_bytes=sum(file.bytes for file in _files(package) if file.role == "weights"),
        state_bytes=manifest.state_bytes(batch),
        cache_bytes=manifest.cache_bytes(length, batch),
        looplm_cache_bytes={loops: once + loops * per_loop for loops in COMPARED_LOOPS},
        most_loops=manifest.most_loops,
    )


def _parity(package: Package) -> ParityFacts | None:
    """Read parity.json. A broken file does not make the package invalid."""
    path = package.directory / PARITY
    if not path.exists() and not path.is_symlink():
        return None
    if not within(path, package.directory):
        return ParityFacts(False, False, (), f"{PARITY} is a link that leaves the package directory")
    try:
        content = read_object(path)
        passed = flag(content.get("passed"), "passed")
        failures = listed(_sentence)(content.get("failures", ()), "failures")
        hashed = content.get("manifest_sha256") or None
        staggered = optional(STAGGERED_COST)(content.get("staggered"), "staggered")
    except (PackageError, FieldError) as error:
        return ParityFacts(False, False, (), str(error))
    return ParityFacts(passed, hashed is None or hashed == package.exported_hash, failures, staggered=staggered)


def _sentence(value: Any, where: str) -> str:
    """Accept any value as a printable sentence."""
    return printable(str(value))[:1000]
