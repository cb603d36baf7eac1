"""The exported package: a directory of manifest, graphs, weights and tokenizer. Read here, written by melt_export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from .engines.spec import EngineSpec
from .errors import ArgumentError, PackageError
from .files import FileSpec, file_hash

FORMAT_VERSION = 1
MANIFEST, PARITY = "manifest.json", "parity.json"
DIALECTS = ("onnxruntime", "standard", "portable")
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
MAX_LOOPS = 1024  # of a token, whoever asks: a package, a session file, a request or a program
STATE_KINDS = ("swap", "in_place", "read_only", "per_loop")
GRAPHS = ("embed", "loop_step", "lm_head")
COMPUTED_FROM = (".onnx", ".data")  # how files end that what is computed depends on


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. ``shape`` mixes sizes with the names "batch", "chunk" and "context"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file and what goes in and out."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class StateSpec:
    """A state tensor of the loop step: allocated once, then reused for every loop and token.

    ``kind``: "swap" (two buffers trade places each loop: hidden, latent), "in_place" (one buffer is bound as
    ``input`` and ``output``: the caches), "read_only" (caches of the portable dialect, whose ``output`` holds the
    chunk's new rows, which the runtime copies in after the last loop), "per_loop" (a LoopLM's caches: ``shape`` begins
    with the number of loops, and loop t binds the t-th part in place).
    """

    input: str
    output: str
    dtype: str
    shape: tuple[int | str, ...]
    kind: str

    @property
    def bound_shape(self) -> tuple[int | str, ...]:
        """What one loop step is given of it: all, or of a cache a loop its own."""
        return self.shape[1:] if self.kind == "per_loop" else self.shape

    def bytes(self, batch: int, chunk: int) -> int:
        """Bytes that the runtime allocates for it, both swap buffers or the new rows included."""
        total = size_of(self.shape, self.dtype, batch=batch, chunk=chunk)
        if self.kind == "swap":
            return 2 * total
        if self.kind == "read_only":
            return total + size_of(rows_shape(self.shape), self.dtype, batch=batch, chunk=chunk)
        return total


def rows_shape(cache: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The shape of a chunk's new rows of a cache (batch, kv_heads, rows, head_dim)."""
    return (cache[0], cache[1], "chunk", cache[3])


def size_of(shape: tuple[int | str, ...], dtype: str, **sizes: int) -> int:
    """Bytes of a tensor, given the sizes of its named dimensions."""
    total = ITEM_BYTES[dtype]
    for dim in shape:
        total *= sizes[dim] if isinstance(dim, str) else dim
    return total


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``. ``model`` is the checkpoint's configuration; ``cache_rows`` is ``max_seq_len`` plus room for
    the padding of one ragged chunk when ``max_batch`` is above 1; ``chunk`` is the prefill chunk and part of the
    model's meaning; ``untrained`` names parts that were initialised and never trained; ``engines``, by name, were built
    from the graphs later and may be absent or deleted: ``files`` does not list theirs; ``weights`` and
    ``cache`` say how products and caches were quantized, empty where they were not."""

    dialect: str
    precision: str
    max_seq_len: int
    cache_rows: int
    max_batch: int
    chunk: int
    loops: int
    exit_threshold: float
    vocab_size: int
    model: dict[str, Any]
    states: tuple[StateSpec, ...]
    graphs: dict[str, GraphSpec]
    files: dict[str, FileSpec]
    untrained: tuple[str, ...] = ()
    libraries: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    engines: dict[str, EngineSpec] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether products or caches have fewer bits than the precision says."""
        return bool(self.weights or self.cache)

    @property
    def weights_bytes(self) -> int:
        """Bytes of graphs and weights, as stored."""
        return sum(spec.bytes for name, spec in self.files.items() if name.endswith(COMPUTED_FROM))

    def state_bytes(self, batch: int = 1) -> int:
        """Bytes of all state tensors for a batch: what a session allocates, whatever the number of loops."""
        return sum(state.bytes(batch, self.chunk) for state in self.states)

    def resized(self, max_seq_len: int) -> Manifest:
        """The manifest that the package would have, exported for another ``max_seq_len``."""
        chunk, padded = min(self.chunk, max_seq_len), self.cache_rows > self.max_seq_len
        rows = max_seq_len + (chunk if padded else 0)
        states = tuple(
            state if state.kind == "swap" else replace(state, shape=(*state.shape[:-2], rows, state.shape[-1]))
            for state in self.states
        )
        return replace(self, max_seq_len=max_seq_len, chunk=chunk, cache_rows=rows, states=states)

    def cache_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes of key/value rows that hold ``tokens`` tokens of each sequence of a batch."""
        caches = [s for s in self.states if s.kind != "swap"]
        rows = sum(size_of((batch, s.bound_shape[1], tokens, s.bound_shape[3]), s.dtype) for s in caches)
        return rows * (self.cache_loops or 1)

    @cached_property
    def cache_loops(self) -> int | None:
        """How many loops have a cache of their own (a LoopLM); None where all loops share one (MELT)."""
        return next((int(s.shape[0]) for s in self.states if s.kind == "per_loop"), None)

    def check_depth(self, loops: int, exit_threshold: float) -> None:
        """Raises ArgumentError for a depth that a LoopLM's caches do not allow; MELT allows any."""
        if self.cache_loops is None:
            return
        if loops > self.cache_loops:
            raise ArgumentError(f"loops is {loops}; this LoopLM package has caches for {self.cache_loops}")
        if exit_threshold < 1.0:
            raise ArgumentError(
                f"exit_threshold is {exit_threshold}; a token of a LoopLM that left early would lack its rows in the "
                "later loops' caches, so only 1.0 is possible"
            )

    def to_json(self) -> str:
        """The manifest as written to disk. A package without engines or quantized parts says nothing of them."""
        content = asdict(self)
        for name in ("engines", "weights", "cache"):
            if not content[name]:
                del content[name]
        return _text(content)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads a manifest. Raises PackageError naming the field at fault."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise PackageError(f"{MANIFEST} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise PackageError(f"{MANIFEST} is not a JSON object")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            advice = "update melt-export" if newer else "export the checkpoint again"
            raise PackageError(
                f"the package has format version {version!r}, this runtime reads {FORMAT_VERSION}: {advice}"
            )
        try:
            # These came later than format 1; what does not know them runs the graphs, so it stays format 1.
            content = {"engines": {}, "weights": {}, "cache": {}, **content}
            values = {f.name: content[f.name] for f in fields(cls)}
            values["states"] = tuple(StateSpec(**{**s, "shape": tuple(s["shape"])}) for s in content["states"])
            values["graphs"] = {name: _graph(content["graphs"][name]) for name in GRAPHS}
            values["files"] = {name: FileSpec(**spec) for name, spec in content["files"].items()}
            values["untrained"] = tuple(content["untrained"])
            values["engines"] = {n: EngineSpec.from_dict(n, spec) for n, spec in content["engines"].items()}
            manifest = cls(**values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PackageError(f"{MANIFEST} is incomplete or malformed at {error}") from error
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Refuses values that cannot be: whoever reads the manifest afterwards can rely on it."""
        for name in ("max_seq_len", "cache_rows", "max_batch", "chunk", "loops", "vocab_size"):
            value = getattr(self, name)
            if not _is_count(value):
                raise PackageError(f"{MANIFEST}: {name} is {value!r}; it must be a whole number from 1")
        if self.loops > MAX_LOOPS:
            raise PackageError(f"{MANIFEST}: loops is above {MAX_LOOPS:,}, the most that a token may have")
        if not isinstance(self.exit_threshold, float | int) or not 0 <= self.exit_threshold <= 1:
            raise PackageError(f"{MANIFEST}: exit_threshold is {self.exit_threshold!r}; it must lie between 0 and 1")
        if self.dialect not in DIALECTS or self.precision not in PRECISIONS:
            raise PackageError(f"{MANIFEST}: unknown dialect {self.dialect!r} or precision {self.precision!r}")
        if not all(isinstance(value, dict) for value in (self.model, self.libraries, self.weights, self.cache)):
            raise PackageError(f"{MANIFEST}: model, libraries, weights and cache must be JSON objects")
        if not all(isinstance(part, str) for part in self.untrained):
            raise PackageError(f"{MANIFEST}: untrained must be a list of names")
        per_loop = any(state.kind == "per_loop" for state in self.states)
        first = ["hidden"] if per_loop else ["hidden", "latent"]
        if [state.input for state in self.states if state.kind == "swap"] != first or len(self.states) < len(first) + 2:
            raise PackageError(f"{MANIFEST}: states must be {', '.join(first)} and a key and value cache a layer")
        if len({(state.kind, state.shape[:1]) for state in self.states[len(first) :]}) > 1:
            raise PackageError(f"{MANIFEST}: the caches are of different kinds")
        for state in self.states:
            rank = {"hidden": 3}.get(state.input, 5 if state.kind == "per_loop" else 4)
            dims = all(_is_count(d) or d in ("batch", "chunk") for d in state.shape)
            if state.kind not in STATE_KINDS or state.dtype not in ITEM_BYTES or len(state.shape) != rank or not dims:
                raise PackageError(f"{MANIFEST}: state {state.input} has an unknown kind, dtype or shape")
        for name in (*self.files, *(graph.file for graph in self.graphs.values())):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name:
                raise PackageError(f"{MANIFEST} names {name!r}, which leaves the package directory")
        unlisted = next((g.file for g in self.graphs.values() if g.file not in self.files), None)
        if unlisted:
            raise PackageError(f"{MANIFEST} lists no hash for {unlisted}")


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def manifest_hash(directory: Path) -> str:
    """SHA-256 of a package's manifest as it was exported: engines, built later, change nothing of what was verified."""
    text = (directory / MANIFEST).read_text(encoding="utf-8")
    content = json.loads(text)
    if content.pop("engines", None) is not None:
        text = _text(content)
    return hashlib.sha256(text.encode()).hexdigest()


def source_hash(manifest: Manifest) -> str:
    """What an engine is built from: a hash over the hashes of graphs and weights."""
    parts = sorted(f"{name} {spec.sha256}" for name, spec in manifest.files.items() if name.endswith(COMPUTED_FROM))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def with_engines(text: str, change: Callable[[dict[str, Any]], None]) -> str:
    """The text of a manifest in which ``change`` has edited the engines' entries, and nothing else is touched."""
    content = json.loads(text)
    engines = content.pop("engines", {})
    change(engines)
    return _text({**content, "engines": engines} if engines else content)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _graph(content: Mapping[str, Any]) -> GraphSpec:
    def tensors(items: list[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(i["name"], i["dtype"], tuple(i["shape"])) for i in items)

    return GraphSpec(content["file"], tensors(content["inputs"]), tensors(content["outputs"]))


@dataclass(frozen=True)
class Package:
    """A package on disk whose manifest was read and whose files were checked."""

    directory: Path
    manifest: Manifest

    @classmethod
    def open(
        cls, directory: Path | str, *, check_hashes: bool = True, progress: Callable[[int], None] | None = None
    ) -> Package:
        """Reads and checks a package. Raises PackageError.

        Presence and size of every file are always checked; their hashes unless ``check_hashes`` is False.
        ``progress`` is called with the bytes hashed since the last call.
        """
        directory = Path(directory)
        if not directory.is_dir():
            what = "is a file; a package is a directory" if directory.exists() else "does not exist"
            raise PackageError(f"package {directory} {what}")
        path = directory / MANIFEST
        if not path.is_file():
            raise PackageError(f"{directory} has no {MANIFEST}; it is not a package made by melt-export")
        try:
            manifest = Manifest.from_json(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise PackageError(f"{path} is not UTF-8 text") from error
        root = directory.resolve()
        for name, spec in manifest.files.items():
            file = directory / name
            if not file.resolve().is_relative_to(root):
                raise PackageError(f"{file} is a link that leaves the package directory")
            if not file.is_file():
                raise PackageError(f"{directory} lacks {name}, which its manifest lists")
            if file.stat().st_size != spec.bytes:
                raise PackageError(f"{file} has {file.stat().st_size} bytes, its manifest says {spec.bytes}")
            if check_hashes and file_hash(file, progress) != spec.sha256:
                raise PackageError(f"{file} was changed: its hash is not the manifest's")
        return cls(directory, manifest)

    def path(self, name: str) -> Path:
        """The path of a graph ("embed", "loop_step", "lm_head")."""
        return self.directory / self.manifest.graphs[name].file
