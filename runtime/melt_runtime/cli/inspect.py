"""What is in a package, as plain facts: read from its manifest and file list, without loading a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..backends.choose import Choice, choices
from ..backends.devices import detect_environment
from ..errors import ArgumentError, PackageError
from ..loaded_model import load_tokenizer
from ..package.engine_spec import EngineSpec
from ..package.example_prompt import example_prompt
from ..package.files import within
from ..package.manifest import PARITY, Manifest
from ..package.reader import Package
from ..text.end_tokens import EndToken, end_tokens
from ..untrusted import FieldError, flag, listed, printable, read_object

# What the loops column of the comparison with a LoopLM shows.
COMPARED_LOOPS = (1, 2, 4, 8, 16)
_UNTRAINED = {
    "latent_gate": "the latent gate is untrained: answers will be poor until it is trained",
    "early_exit_gate": "the early exit gate is untrained: no token leaves the loops early until it is trained",
}
_TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class FileFacts:
    """A file: ``role`` is "graph", "weights" or "text" (tokenizer, templates, settings)."""

    name: str
    role: str
    bytes: int


@dataclass(frozen=True)
class GraphFacts:
    """A graph: its ONNX file, that file's bytes, and the names that go in and out."""

    name: str
    file: str
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class StateFacts:
    """A state of the loop step. ``bytes`` is what a session of the described batch allocates for it."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int | str, ...]
    bytes: int


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes at ``length`` tokens in each of ``batch`` sequences.

    ``weights_bytes``: the weights as stored. ``state_bytes``: all state a session allocates, at any number of loops
    and any length. ``cache_bytes``: the key/value rows that the tokens occupy. ``looplm_cache_bytes``: the rows that
    a LoopLM with one cache per loop would occupy, by its number of loops.
    """

    length: int
    batch: int
    weights_bytes: int
    state_bytes: int
    cache_bytes: int
    looplm_cache_bytes: dict[int, int]


@dataclass(frozen=True)
class ParityFacts:
    """What parity.json says. ``current`` is False when it was written for another manifest than the package's;
    ``problem`` says why it cannot be read, where it cannot."""

    passed: bool
    current: bool
    failures: tuple[str, ...]
    problem: str | None = None

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
    """Everything ``melt-run inspect`` shows. Sizes of the model that its configuration does not name are None.

    ``parity`` is None for a package that was never verified. ``warnings`` are sentences for people. ``backends``: what
    could run the package on this machine, best first, and why the others cannot.
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
    parity: ParityFacts | None
    graphs: tuple[GraphFacts, ...]
    files: tuple[FileFacts, ...]
    states: tuple[StateFacts, ...]
    memory: MemoryFacts
    libraries: dict[str, str]
    engines: dict[str, EngineSpec]
    backends: tuple[Choice, ...]

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain values that ``json`` can write."""
        return asdict(self)


def describe(package: Package, *, length: int | None = None, batch: int = 1, device: int = 0) -> PackageFacts:
    """The facts of an open package, with its memory at a length in tokens (None: all it can hold) and a batch, and
    what could run it on this machine (on an NVIDIA device of this index, where there is one).

    Raises ArgumentError for a length or batch beyond the package's, PackageError for a broken tokenizer.
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


def arithmetic_of(manifest: Manifest) -> str:
    """What a package computes in, for people."""
    if not manifest.weights:
        return manifest.precision
    products = f"{manifest.precision}; {manifest.weights.get('kind')} weights are multiplied on the CPU with"
    return f"{products} {'float' if activations_of(manifest) == 'float' else '8-bit'} activations"


def activations_of(manifest: Manifest) -> str | None:
    """What quantized weights are multiplied with by ONNX Runtime on the CPU: "int8" or "float"; None without any."""
    return str(manifest.weights.get("activations", "int8")) if manifest.weights else None


def untrained_warnings(manifest: Manifest, loops: int | None = None) -> tuple[str, ...]:
    """One sentence for each part of a model that was initialised, never trained, and is read in so many loops (None:
    as many as the package runs)."""
    unread = unread_parts(manifest.model, manifest.loops if loops is None else loops)
    return tuple(
        _UNTRAINED.get(part, f"the part {part!r} is untrained") for part in manifest.untrained if part not in unread
    )


def unread_parts(model: Mapping[str, Any], loops: int) -> tuple[str, ...]:
    """The gates of a configuration that no answer depends on in so many loops: in one loop no token can leave before
    its last, and a latent that starts at its input stays there, whatever a gate says."""
    if loops > 1:
        return ()
    starts_at_input = model.get("latent_init", "first_input") == "first_input"
    return ("early_exit_gate", "latent_gate") if starts_at_input else ("early_exit_gate",)


def _files(package: Package) -> tuple[FileFacts, ...]:
    graphs = {graph.file for graph in package.manifest.graphs.values()}

    def role(name: str) -> str:
        if name in graphs:
            return "graph"
        return "text" if name.endswith(_TEXT_SUFFIXES) else "weights"

    return tuple(FileFacts(name, role(name), spec.bytes) for name, spec in package.manifest.files.items())


def _memory(package: Package, length: int, batch: int) -> MemoryFacts:
    manifest = package.manifest
    cache = manifest.cache_bytes(length, batch)
    return MemoryFacts(
        length=length,
        batch=batch,
        weights_bytes=sum(file.bytes for file in _files(package) if file.role == "weights"),
        state_bytes=manifest.state_bytes(batch),
        cache_bytes=cache,
        looplm_cache_bytes={loops: loops * cache // (manifest.cache_loops or 1) for loops in COMPARED_LOOPS},
    )


def _parity(package: Package) -> ParityFacts | None:
    """What parity.json says; a broken one says nothing of the package, which is as sound as before."""
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
    except (PackageError, FieldError) as error:
        return ParityFacts(False, False, (), str(error))
    return ParityFacts(passed, hashed is None or hashed == package.exported_hash, failures)


def _sentence(value: Any, where: str) -> str:
    """A sentence, as it can be shown."""
    return printable(str(value))[:1000]
