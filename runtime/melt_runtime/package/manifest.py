"""The manifest of a package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from ..errors import ArgumentError
from .engine_spec import EngineSpec
from .files import FileSpec
from .specs import CODA, PRELUDE, GraphSpec, StateSpec, is_latent, size_of

FORMAT_VERSION = 5  # the newest; packages that older runtimes can run keep the version that these read
_ONE_LOOP = 2  # no latent; in packages of several loops, a latent per layer instead of one for all
_BY_TOKEN = 3  # first_loop per token instead of per sequence
STAGES = 4  # prelude, injection, coda, a start other than the embedding; no exit gate; caches per loop, only read
FEWER_LOOPS = 5  # a calibrated exit that allows fewer loops than the package's
MANIFEST, PARITY = "manifest.json", "parity.json"
COMPUTED_FROM = (".onnx", ".data")  # suffixes of the files that determine results


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    ``model``: the checkpoint's configuration. ``cache_rows``: positions of the caches, ``max_seq_len`` plus, if
    ``max_batch`` is above 1, padding of one chunk. ``chunk``: the prefill chunk, which affects results. ``untrained``:
    parts that were initialised but not trained. ``engines``: by name, built later and deletable; their files are not in
    ``files``. ``weights``, ``cache``: how they were quantized; empty if they were not. ``start``: the hidden state
    before the first loop, its ``state`` and the ``std`` of its noise; empty if it is what ``embed`` gives.
    ``shared_caches``: what it costs that the loops share caches, where they were trained with caches of their own;
    empty elsewhere. ``exit``: the criteria by which tokens may leave the loops, calibrated at export, the most loops
    that they allow (``most_loops``; absent: ``loops``), and what that costs; empty if they were not.
    """

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
    start: dict[str, Any] = field(default_factory=dict)
    shared_caches: dict[str, Any] = field(default_factory=dict)
    exit: dict[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether weights or caches have fewer bits than the precision."""
        return bool(self.weights or self.cache)

    @property
    def weights_bytes(self) -> int:
        """Bytes of graphs and weights, as stored."""
        return sum(spec.bytes for name, spec in self.files.items() if name.endswith(COMPUTED_FROM))

    def state_bytes(self, batch: int = 1) -> int:
        """Return the bytes of all state tensors of a batch: what a session allocates, whatever the number of loops."""
        return sum(state.bytes(batch, self.chunk) for state in self.states)

    def resized(self, max_seq_len: int) -> Manifest:
        """Return the manifest as if the package had been exported for another ``max_seq_len``."""
        chunk, padded = min(self.chunk, max_seq_len), self.cache_rows > self.max_seq_len
        positions = max_seq_len + (chunk if padded else 0)
        states = tuple(
            state if state.kind == "swap" else replace(state, shape=(*state.shape[:-2], positions, state.shape[-1]))
            for state in self.states
        )
        return replace(self, max_seq_len=max_seq_len, chunk=chunk, cache_rows=positions, states=states)

    def cache_bytes(self, tokens: int, batch: int = 1) -> int:
        """Return the bytes of cached keys and values for ``tokens`` tokens of each sequence of a batch."""
        return self.cache_bytes_once(tokens, batch) + self.cache_bytes_per_loop(tokens, batch) * (self.cache_loops or 1)

    def cache_bytes_once(self, tokens: int, batch: int = 1) -> int:
        """Return the bytes of the layers before and after the loops, as ``cache_bytes``."""
        return self._bytes_of((state for state in self.caches if state.stage != "core"), tokens, batch)

    def cache_bytes_per_loop(self, tokens: int, batch: int = 1) -> int:
        """Return the bytes of one cache per layer of the loop, as ``cache_bytes``."""
        return self._bytes_of(self.core_caches, tokens, batch)

    @staticmethod
    def _bytes_of(caches: Iterable[StateSpec], tokens: int, batch: int) -> int:
        return sum(size_of((batch, s.bound_shape[1], tokens, s.bound_shape[3]), s.dtype) for s in caches)

    @cached_property
    def caches(self) -> tuple[StateSpec, ...]:
        """The caches of all stages."""
        return tuple(state for state in self.states if state.kind != "swap")

    @cached_property
    def core_caches(self) -> tuple[StateSpec, ...]:
        """The caches of the loop step."""
        return tuple(state for state in self.caches if state.stage == "core")

    def caches_of(self, graph: str) -> tuple[StateSpec, ...]:
        """Return the caches that a graph reads and writes."""
        named = {spec.name for spec in self.graphs[graph].inputs}
        return tuple(state for state in self.caches if state.input in named)

    @cached_property
    def has_exit_gate(self) -> bool:
        """Whether the loop step gives an exit probability."""
        return any(spec.name == "exit_probability" for spec in self.graphs["loop_step"].outputs)

    @cached_property
    def has_prelude(self) -> bool:
        """Whether the embedding's graph has layers, and so caches."""
        return any(state.stage == PRELUDE for state in self.states)

    @cached_property
    def injects(self) -> bool:
        """Whether every loop also reads the embedding graph's output."""
        return any(spec.name == "injected" for spec in self.graphs["loop_step"].inputs)

    @cached_property
    def has_stages(self) -> bool:
        """Whether a token's run has more than embedding, loops and head."""
        return self.has_prelude or self.injects or self.has_coda

    @cached_property
    def has_coda(self) -> bool:
        """Whether a graph stands between the last loop and the head."""
        return CODA in self.graphs

    @cached_property
    def cache_loops(self) -> int | None:
        """The number of loops with their own cache (LoopLM); None if all loops share one (MELT)."""
        return next((int(s.shape[0]) for s in self.states if s.by_loop), None)

    @cached_property
    def has_latent(self) -> bool:
        """Whether the loop step carries a latent from loop to loop: a MELT of more than one."""
        return any(is_latent(state) for state in self.states)

    @cached_property
    def staggers(self) -> bool:
        """Whether the tokens of a chunk may be in different loops: ``first_loop`` is given per token, not per
        sequence."""
        inputs = self.graphs["loop_step"].inputs
        return any(spec.name == "first_loop" and len(spec.shape) > 1 for spec in inputs)

    @property
    def most_loops(self) -> int | None:
        """How many loops a token may have: as many as have caches of their own, one where nothing is carried to a
        second; None: any number."""
        return None if self.has_latent else self.cache_loops or 1

    @property
    def exit_loops(self) -> int:
        """The most loops of a token under the calibrated exit; ``loops`` without one."""
        return self.exit.get("most_loops") or self.loops

    def with_exit(self, found: Mapping[str, Any]) -> Manifest:
        """Return the manifest with a calibrated exit. Runtimes that would run it with too many loops refuse its format
        version."""
        fewer = found.get("most_loops") is not None
        version = max(self.format_version, FEWER_LOOPS) if fewer else self.format_version
        return replace(self, exit=dict(found), format_version=version)

    def check_depth(self, loops: int, exit_threshold: float) -> None:
        """Raise ArgumentError for a depth that a LoopLM's caches, or a package of one loop, do not allow, and for an
        exit threshold without an exit gate."""
        if exit_threshold < 1.0 and not self.has_exit_gate:
            raise ArgumentError(
                f"exit_threshold is {exit_threshold}, but the model has no exit gate and so no exit probability"
            )
        if self.most_loops == 1 and loops > 1:
            raise ArgumentError(
                f"loops is {loops}; this package runs one: its checkpoint has total_ut_steps 1, and nothing that a "
                "second loop would need was exported"
            )
        if self.cache_loops is None:
            return
        if loops > self.cache_loops:
            raise ArgumentError(f"loops is {loops}; this LoopLM package has caches for {self.cache_loops}")
        if exit_threshold < 1.0:
            raise ArgumentError(
                f"exit_threshold is {exit_threshold}; a token of a LoopLM that left early would be missing from the "
                "later loops' caches, so only 1.0 is possible"
            )

    def to_json(self) -> str:
        """Return the text of ``manifest.json``. Empty entries that older formats lack are omitted."""
        content = asdict(self)
        for name in ("engines", "weights", "cache", "start", "shared_caches", "exit"):
            if not content[name]:
                del content[name]
        return manifest_text(content)


def version_for(states: Sequence[StateSpec], graphs: Mapping[str, GraphSpec]) -> int:
    """Return the oldest format version of a package that is exported with these states and graphs."""
    outputs = {spec.name for spec in graphs["loop_step"].outputs}
    inputs = {spec.name for spec in graphs["loop_step"].inputs}
    if "exit_probability" not in outputs or "injected" in inputs or CODA in graphs or len(graphs["embed"].inputs) > 1:
        return STAGES
    if any(state.by_loop for state in states):
        return STAGES if any(state.gives_rows for state in states) else 1
    return _BY_TOKEN if any(is_latent(state) for state in states) else _ONE_LOOP


def manifest_text(content: Mapping[str, Any]) -> str:
    """Format a manifest as JSON."""
    return json.dumps(content, indent=2) + "\n"
