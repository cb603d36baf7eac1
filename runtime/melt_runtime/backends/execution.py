"""Execution of TensorRT engines: loading, contexts with shapes and addresses, and captured work."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engines.library import Library
from ..engines.network_checks import engine_dtype
from ..errors import BackendError, PackageError
from ..package.contract import graph_difference
from ..package.engine_spec import ProfileSpec
from ..package.specs import NAMED_SIZES, GraphSpec, TensorSpec
from .bindings import Bindings
from .cuda import Graph, Stream

TOP_OUTPUTS = {"top_logits": "float32", "top_ids": "int32", "log_sum": "float32"}  # a head may have them
# Enough for each attention length of a cache of 16,384 positions, and for the about 20 different pipelined runs of a
# MELT of four loops at one length.
_MAX_RECORDINGS = 32


@dataclass(frozen=True)
class Bound:
    """A graph's shapes and addresses, and the optimisation profile that allows them."""

    graph: str
    profile: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    addresses: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, graph: str, profile: int, bindings: Bindings, address: Callable[[str], int]) -> Bound:
        """Make a Bound of bindings. ``address``: returns a buffer's address."""
        inputs, outputs = bindings
        return cls(
            graph,
            profile,
            tuple((tensor.tensor, tensor.shape) for tensor in inputs),
            tuple((tensor.tensor, address(tensor.buffer) + tensor.offset) for tensor in (*inputs, *outputs)),
        )


class GraphEngine:
    """A deserialized engine of one graph. Its contexts use scratch memory of the state that runs them.

    ``spec``: the graph's inputs and outputs; a head may also give top candidates, ``candidate_count`` of them.
    ``fixed``: named dimensions with one size in all profiles, which an engine may report as that size. Raises
    BackendError for a plan that cannot be loaded, PackageError for one of another graph.
    """

    def __init__(
        self,
        library: Library,
        runtime: Any,
        graph: str,
        spec: GraphSpec,
        path: Path,
        stream_weights: bool,
        fixed: Mapping[str, int],
    ):
        self.library, self.graph, self.fixed = library, graph, fixed
        library.messages.clear()
        self.engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise BackendError(f"{library.title} {library.version} cannot load {path}: {library.messages.reason()}")
        if stream_weights and self.engine.streamable_weights_size > 0:
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()
        self.candidate_count = self._check(spec, path)
        self.scratch_bytes = int(self.engine.device_memory_size_v2)
        self._config = self._make_config()

    def _check(self, spec: GraphSpec, path: Path) -> int:
        """Check that the engine's tensors are the graph's. Return the number of top candidates. Raises PackageError."""
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        sides: dict[bool, list[TensorSpec]] = {True: [], False: []}
        named = {tensor.name: tensor.shape for tensor in (*spec.inputs, *spec.outputs)}
        for name in names:
            shape = tuple(self.engine.get_tensor_shape(name))
            if name in named and len(named[name]) == len(shape):  # engines do not store names of dimensions
                shape = tuple(
                    dim if isinstance(dim, str) and size in (-1, self.fixed.get(dim)) else size
                    for dim, size in zip(named[name], shape, strict=True)
                )
            mode = str(self.engine.get_tensor_mode(name)).rpartition(".")[2]
            found = TensorSpec(name, engine_dtype(self.engine.get_tensor_dtype(name)), shape)
            sides[mode == "INPUT"].append(found)
        top = {t.name: t for t in sides[False] if self.graph == "lm_head" and t.name in TOP_OUTPUTS}
        outputs = [tensor for tensor in sides[False] if tensor.name not in top]
        problem = graph_difference(spec, sides[True], outputs) or _candidates_difference(spec, top)
        if problem is not None:
            raise PackageError(f"{path} is not of the graph that the manifest describes: {problem}")
        return int(top["top_ids"].shape[-1]) if top else 0

    def _make_config(self) -> Any:
        """Make a runtime config. TensorRT-RTX compiles kernels on the device: contexts share them through its cache."""
        strategy = self.library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self.engine, "create_runtime_config"):
            return strategy
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if hasattr(config, "create_runtime_cache"):
            config.set_runtime_cache(config.create_runtime_cache())
        return config

    def context(self, profile: int, stream: Stream, scratch: int) -> GraphContext:
        """Make a context for a profile, with scratch memory at an address. Raises BackendError."""
        with self.library.lock:
            self.library.messages.clear()
            context = self.engine.create_execution_context(self._config)
            if context is None or not context.set_optimization_profile_async(profile, stream.handle):
                raise BackendError(
                    f"{self.library.title} cannot make a context for {self.graph}: {self.library.messages.reason()}"
                )
        context.set_device_memory(scratch, self.scratch_bytes)
        stream.synchronize()
        return GraphContext(self, context)


def single_sizes(profiles: Iterable[ProfileSpec]) -> dict[str, int]:
    """Return the named dimensions that have one size in all profiles."""
    found: dict[str, set[int]] = {}
    for profile in profiles:
        for name in NAMED_SIZES:
            found.setdefault(name, set()).update(getattr(profile, name))
    return {name: sizes.pop() for name, sizes in found.items() if len(sizes) == 1}


def _candidates_difference(head: GraphSpec, top: Mapping[str, TensorSpec]) -> str | None:
    """Return what is wrong with a head's candidate outputs, or None."""
    if not top:
        return None
    if top.keys() != TOP_OUTPUTS.keys():
        return f"of {', '.join(TOP_OUTPUTS)} it has only {', '.join(top)}"
    most, vocabulary = top["top_ids"].shape[-1], head.outputs[0].shape[-1]
    if not isinstance(most, int) or not isinstance(vocabulary, int) or not 1 <= most <= vocabulary:
        return f"it picks out {most} tokens of {vocabulary}"
    for name, spec in top.items():
        count = 1 if name == "log_sum" else most
        if spec.dtype != TOP_OUTPUTS[name] or len(spec.shape) != 3 or spec.shape[-1] != count:
            return f"{name} is {spec.dtype} {list(spec.shape)}, not {TOP_OUTPUTS[name]} (batch, chunk, {count})"
    return None


class GraphContext:
    """An execution context that sets only shapes and addresses that changed since its last run."""

    def __init__(self, engine: GraphEngine, context: Any):
        self.engine, self.context = engine, context
        self._shapes: tuple[Any, ...] = ()
        self._addresses: tuple[Any, ...] = ()

    def run(self, bound: Bound, stream: Stream) -> None:
        """Queue a run on the stream. Raises BackendError with the library's reason."""
        with self.engine.library.lock:
            self._run(bound, stream)

    def _run(self, bound: Bound, stream: Stream) -> None:
        messages = self.engine.library.messages
        messages.clear()
        if self._shapes != bound.shapes:
            self._shapes = ()
            for name, shape in bound.shapes:
                self._require(self.context.set_input_shape(name, shape), f"shape {shape} of {name}")
            self._shapes = bound.shapes
        if self._addresses != bound.addresses:
            self._addresses = ()
            for name, address in bound.addresses:
                self._require(self.context.set_tensor_address(name, address), f"the address of {name}")
            self._addresses = bound.addresses
        if not self.context.execute_async_v3(stream.handle):
            raise BackendError(f"{self.engine.library.title} failed in {self.engine.graph}: {messages.reason()}")

    def capturable(self, stream: Stream) -> bool:
        """Return whether its runs may be captured; True if the library cannot tell."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(stream.handle))

    def _require(self, done: bool, what: str) -> None:
        if not done:
            library = self.engine.library
            raise BackendError(f"{library.title} refuses {what} in {self.engine.graph}: {library.messages.reason()}")


class Contexts:
    """Contexts by graph and profile, made at first use."""

    def __init__(self, engines: dict[str, GraphEngine], stream: Stream, scratch: int):
        self._engines, self._stream, self._scratch = engines, stream, scratch
        self._made: dict[tuple[str, int], GraphContext] = {}

    def run(self, bound: Bound) -> None:
        """Queue a graph's run on the stream."""
        key = (bound.graph, bound.profile)
        if key not in self._made:
            self._made[key] = self._engines[bound.graph].context(bound.profile, self._stream, self._scratch)
        self._made[key].run(bound, self._stream)

    def capturable(self) -> bool:
        """Return whether the runs of all contexts may be captured."""
        return all(context.capturable(self._stream) for context in self._made.values())


@dataclass
class _Recording:
    contexts: Contexts
    graph: Graph | None = None
    refused: str | None = None  # why capturing failed
    uses: int = field(default=0)


class Recordings:
    """Repeated work: run directly the first time, captured the second, then replayed. The least recently used are
    dropped.

    The first run lets the library finish what it defers after a change of shapes. Each recording has its own contexts,
    because a graph refers to its context's device data.
    """

    def __init__(self, stream: Stream, contexts: Callable[[], Contexts], most: int = _MAX_RECORDINGS):
        self._stream, self._contexts, self._most = stream, contexts, most
        self._made: OrderedDict[Hashable, _Recording] = OrderedDict()

    def play(self, key: Hashable, work: Callable[[Contexts], None]) -> None:
        """Queue ``work``, from its graph if captured. Equal keys must mean equal work."""
        recording = self._made.get(key)
        if recording is None:
            if len(self._made) >= self._most:
                self._stream.synchronize()
                self._made.popitem(last=False)
            recording = self._made[key] = _Recording(self._contexts())
        self._made.move_to_end(key)
        if recording.graph is None and recording.uses and recording.refused is None:
            self._capture(recording, work)
        if recording.graph is not None:
            recording.graph.launch()
        else:
            work(recording.contexts)
        recording.uses += 1  # not reached after a failed run, whose contexts are not ready for capture

    def _capture(self, recording: _Recording, work: Callable[[Contexts], None]) -> None:
        if not recording.contexts.capturable():
            recording.refused = "the library says that its context cannot be captured"
            return
        try:
            recording.graph = self._stream.capture(lambda: work(recording.contexts))
        except BackendError as error:
            recording.refused = str(error)

    def refusals(self) -> dict[Hashable, str]:
        """Return why repeated work was not captured, by key."""
        return {key: recording.refused for key, recording in self._made.items() if recording.refused is not None}

    def captured(self) -> list[Hashable]:
        """Return the keys of all captured graphs."""
        return [key for key, recording in self._made.items() if recording.graph is not None]
