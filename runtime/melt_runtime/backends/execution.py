"""Engines on a device: plans loaded, contexts with their shapes and addresses, and work captured to be replayed."""

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

CANDIDATES = {"top_logits": "float32", "top_ids": "int32", "log_sum": "float32"}  # what a head may give besides
_MAX_RECORDINGS = 16  # one for each attention length of a cache of 16,384 rows, and some


@dataclass(frozen=True)
class Bound:
    """A graph's shapes and addresses, and the optimisation profile that admits them."""

    graph: str
    profile: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    addresses: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, graph: str, profile: int, bindings: Bindings, address: Callable[[str], int]) -> Bound:
        """``address`` gives where a buffer lies."""
        inputs, outputs = bindings
        return cls(
            graph,
            profile,
            tuple((tensor.tensor, tensor.shape) for tensor in inputs),
            tuple((tensor.tensor, address(tensor.buffer) + tensor.offset) for tensor in (*inputs, *outputs)),
        )


class Plan:
    """A deserialized engine of one graph. Its contexts take their scratch memory from the state that uses them.

    ``spec``: what must go in and out; the head may give the likeliest tokens besides, and ``likeliest`` says how many.
    ``fixed``: the named dimensions that have one size in all profiles, which an engine may know as that size. Raises
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
        self.likeliest = self._check(spec, path)
        self.scratch_bytes = int(self.engine.device_memory_size_v2)
        self._config = self._make_config()

    def _check(self, spec: GraphSpec, path: Path) -> int:
        """Refuses an engine whose tensors are not the graph's. Returns how many of the likeliest tokens it gives."""
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        sides: dict[bool, list[TensorSpec]] = {True: [], False: []}
        named = {tensor.name: tensor.shape for tensor in (*spec.inputs, *spec.outputs)}
        for name in names:
            shape = tuple(self.engine.get_tensor_shape(name))
            if name in named and len(named[name]) == len(shape):  # an engine knows no names of dimensions
                shape = tuple(
                    dim if isinstance(dim, str) and size in (-1, self.fixed.get(dim)) else size
                    for dim, size in zip(named[name], shape, strict=True)
                )
            mode = str(self.engine.get_tensor_mode(name)).rpartition(".")[2]
            found = TensorSpec(name, engine_dtype(self.engine.get_tensor_dtype(name)), shape)
            sides[mode == "INPUT"].append(found)
        few = {t.name: t for t in sides[False] if self.graph == "lm_head" and t.name in CANDIDATES}
        outputs = [tensor for tensor in sides[False] if tensor.name not in few]
        problem = graph_difference(spec, sides[True], outputs) or _candidates_difference(spec, few)
        if problem is not None:
            raise PackageError(f"{path} is not of the graph that the manifest describes: {problem}")
        return int(few["top_ids"].shape[-1]) if few else 0

    def _make_config(self) -> Any:
        """TensorRT-RTX compiles kernels on the device: its contexts share what was compiled."""
        strategy = self.library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self.engine, "create_runtime_config"):
            return strategy
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if hasattr(config, "create_runtime_cache"):
            config.set_runtime_cache(config.create_runtime_cache())
        return config

    def context(self, profile: int, stream: Stream, scratch: int) -> PlanContext:
        """A context for a profile, with scratch memory at an address. Raises BackendError."""
        with self.library.lock:
            self.library.messages.clear()
            context = self.engine.create_execution_context(self._config)
            if context is None or not context.set_optimization_profile_async(profile, stream.handle):
                raise BackendError(
                    f"{self.library.title} cannot make a context for {self.graph}: {self.library.messages.reason()}"
                )
        context.set_device_memory(scratch, self.scratch_bytes)
        stream.synchronize()
        return PlanContext(self, context)


def single_sizes(profiles: Iterable[ProfileSpec]) -> dict[str, int]:
    """The named dimensions that have one size in all of an engine's profiles."""
    found: dict[str, set[int]] = {}
    for profile in profiles:
        for name in NAMED_SIZES:
            found.setdefault(name, set()).update(getattr(profile, name))
    return {name: sizes.pop() for name, sizes in found.items() if len(sizes) == 1}


def _candidates_difference(head: GraphSpec, few: Mapping[str, TensorSpec]) -> str | None:
    """What is wrong with the likeliest tokens that a head gives, if it gives any."""
    if not few:
        return None
    if few.keys() != CANDIDATES.keys():
        return f"of {', '.join(CANDIDATES)} it has only {', '.join(few)}"
    most, vocabulary = few["top_ids"].shape[-1], head.outputs[0].shape[-1]
    if not isinstance(most, int) or not isinstance(vocabulary, int) or not 1 <= most <= vocabulary:
        return f"it picks out {most} tokens of {vocabulary}"
    for name, spec in few.items():
        count = 1 if name == "log_sum" else most
        if spec.dtype != CANDIDATES[name] or len(spec.shape) != 3 or spec.shape[-1] != count:
            return f"{name} is {spec.dtype} {list(spec.shape)}, not {CANDIDATES[name]} (batch, chunk, {count})"
    return None


class PlanContext:
    """An execution context that is told only what changed since its last run."""

    def __init__(self, plan: Plan, context: Any):
        self.plan, self.context = plan, context
        self._shapes: tuple[Any, ...] = ()
        self._addresses: tuple[Any, ...] = ()

    def run(self, bound: Bound, stream: Stream) -> None:
        """Puts a run on the stream. Raises BackendError with the library's own words."""
        with self.plan.library.lock:
            self._run(bound, stream)

    def _run(self, bound: Bound, stream: Stream) -> None:
        messages = self.plan.library.messages
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
            raise BackendError(f"{self.plan.library.title} failed in {self.plan.graph}: {messages.reason()}")

    def capturable(self, stream: Stream) -> bool:
        """Whether its runs may be captured; a library that does not say is taken to allow it."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(stream.handle))

    def _require(self, done: bool, what: str) -> None:
        if not done:
            library = self.plan.library
            raise BackendError(f"{library.title} refuses {what} in {self.plan.graph}: {library.messages.reason()}")


class Contexts:
    """Contexts by graph and profile, made when they are first used."""

    def __init__(self, plans: dict[str, Plan], stream: Stream, scratch: int):
        self._plans, self._stream, self._scratch = plans, stream, scratch
        self._made: dict[tuple[str, int], PlanContext] = {}

    def run(self, bound: Bound) -> None:
        """Puts a graph's run on the stream."""
        key = (bound.graph, bound.profile)
        if key not in self._made:
            self._made[key] = self._plans[bound.graph].context(bound.profile, self._stream, self._scratch)
        self._made[key].run(bound, self._stream)

    def capturable(self) -> bool:
        """Whether the runs of all of them may be captured."""
        return all(context.capturable(self._stream) for context in self._made.values())


@dataclass
class _Recording:
    contexts: Contexts
    graph: Graph | None = None
    refused: str | None = None  # why it is not captured
    uses: int = field(default=0)


class Recordings:
    """Work that comes again: run plainly the first time, captured the second, then replayed; the oldest make way.

    The first, plain run lets the library settle what it puts off after a change of shapes. Each recording has
    contexts of its own, because a graph holds what its context keeps on the device.
    """

    def __init__(self, stream: Stream, contexts: Callable[[], Contexts], most: int = _MAX_RECORDINGS):
        self._stream, self._contexts, self._most = stream, contexts, most
        self._made: OrderedDict[Hashable, _Recording] = OrderedDict()

    def play(self, key: Hashable, work: Callable[[Contexts], None]) -> None:
        """Puts ``work`` on the stream, from its graph if there is one; it must be the same for an equal key."""
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
        recording.uses += 1  # a run that failed is none: its contexts are not ready to be captured

    def _capture(self, recording: _Recording, work: Callable[[Contexts], None]) -> None:
        if not recording.contexts.capturable():
            recording.refused = "the library says that its context cannot be captured"
            return
        try:
            recording.graph = self._stream.capture(lambda: work(recording.contexts))
        except BackendError as error:
            recording.refused = str(error)

    def refusals(self) -> dict[Hashable, str]:
        """Why work that came again was not captured, by key."""
        return {key: recording.refused for key, recording in self._made.items() if recording.refused is not None}

    def captured(self) -> list[Hashable]:
        """The keys of all graphs."""
        return [key for key, recording in self._made.items() if recording.graph is not None]
