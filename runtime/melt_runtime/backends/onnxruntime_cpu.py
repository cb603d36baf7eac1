"""Run a package with ONNX Runtime on the CPU. Buffers are bound by address; nothing is copied between loops."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, BackendError, PackageError
from ..machine import available_memory, physical_cores
from ..package.contract import graph_difference
from ..package.reader import Package
from ..package.specs import TensorSpec
from ..untrusted import brief
from .bindings import Binding, rounded_up, scratch_buffers
from .buffers import BufferState
from .control import LoopControl
from .cpu_threads import ThreadLimit
from .positions import StridedRegion

# The attention length is rounded up, so that few shapes are bound as the cache grows.
CONTEXT_BUCKET = 64
_ALIGNMENT = 64  # bytes, of buffers
_MAX_VIEWS, _MAX_NOTED = 64, 8
# How long a thread spins for the next operator before it sleeps. Long enough for the gaps within a run, so that nothing
# is lost alone; a spinning thread uses up its share of a core that it shares with another process.
_SPIN_US = 15
# ONNX Runtime's names of element types that differ from NumPy's.
_ELEMENTS = {"float": "float32", "double": "float64"}


class OnnxRuntimeBase:
    """The graphs as ONNX Runtime sessions: what the ONNX Runtime backends share.

    A subclass chooses the providers and opens states.
    """

    name: str

    def __init__(self, package: Package):
        self.package = package
        self.ort: Any = import_onnxruntime()

    def options(self) -> Any:
        """Return session options that log errors only."""
        options = self.ort.SessionOptions()
        options.log_severity_level = 3
        return options

    def load(self, graph: str, options: Any, providers: list[Any] | None) -> Any:
        """Load a graph's session. Raises BackendError, or PackageError for a graph that differs from the manifest."""
        try:
            session = self.ort.InferenceSession(str(self.package.path(graph)), options, providers=providers)
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load {graph}.onnx: {brief(error)}") from error
        sides = ([_tensor(value) for value in side] for side in (session.get_inputs(), session.get_outputs()))
        problem = graph_difference(self.package.manifest.graphs[graph], *sides)
        if problem is not None:
            raise PackageError(f"{self.package.path(graph)} is not the graph that its manifest describes: {problem}")
        return session

    @property
    def max_batch(self) -> int:
        """The most sequences in a batch: as the package was exported."""
        return self.package.manifest.max_batch

    def check_batch(self, batch: int) -> None:
        """Raise ArgumentError for a batch above the package's max_batch."""
        most = self.max_batch
        if not 1 <= batch <= most:
            raise ArgumentError(f"batch is {batch}; this package was exported for 1 to {most} sequences")


def import_onnxruntime() -> Any:
    """Import onnxruntime. Raises BackendError that says how to install it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("ONNX Runtime is not installed; install it with: pip install melt-export[cpu]") from error
    return onnxruntime


class OnnxRuntimeBackend(OnnxRuntimeBase):
    """The CPU backend."""

    name = "onnxruntime"

    def __init__(self, package: Package, threads: int | None = None, low_memory: bool = False):
        if package.manifest.precision == "bf16":
            raise BackendError("ONNX Runtime has no bf16 kernels for the CPU; export this checkpoint as fp32 or fp16")
        super().__init__(package)
        self.low_memory = low_memory
        most = 4 * (os.cpu_count() or 1)
        if threads is not None and not 1 <= threads <= most:
            raise ArgumentError(f"threads is {threads}; on this machine it must lie between 1 and {most}")
        count = physical_cores() if threads is None else threads
        self.sessions = {name: self._session(name, count) for name in package.manifest.graphs}
        graphs = package.manifest.graphs
        self.thread_limit = ThreadLimit(self, count, self.sessions, graphs) if threads is None else None

    def available_bytes(self) -> int | None:
        """Return the machine's available memory in bytes; None if unknown."""
        return available_memory()

    def _session(self, graph: str, threads: int) -> Any:
        options = self.options()
        # Each graph has its own threads: those of the last graph must not spin while the next one runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
        if self.low_memory:
            # Leave weights memory-mapped as stored: nothing is widened, packed or allocated ahead of its use.
            options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_mem_pattern = options.enable_cpu_mem_arena = False
            options.execution_order = self.ort.ExecutionOrder.PRIORITY_BASED  # widens each weight just before its use
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self.package.manifest.weights.get("activations") == "float":
            # Else ONNX Runtime fuses DequantizeLinear and MatMul into a matmul that rounds activations to 8 bits.
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        options.intra_op_num_threads = threads
        return self.load(graph, options, ["CPUExecutionProvider"])

    def open_state(self, batch: int) -> OnnxRuntimeState:
        """Allocate all state of a batch. Raises ArgumentError above the package's max_batch, BackendError."""
        self.check_batch(batch)
        manifest, free = self.package.manifest, self.available_bytes()
        state, scratch = manifest.state_bytes(batch), sum(scratch_buffers(manifest, batch).values())
        if free is not None and state + scratch > free:
            raise BackendError(
                f"a batch of {batch} needs {state + scratch:,} bytes of memory ({state:,} of state, {scratch:,} of "
                f"scratch), {free:,} are available; use a smaller batch or export with a smaller --max-seq-len"
            )
        try:
            return OnnxRuntimeState(self, batch)
        except MemoryError as error:
            need = self.package.manifest.state_bytes(batch)
            raise BackendError(f"there is no memory for {need:,} bytes of state; use a smaller batch") from error


@dataclass(frozen=True)
class _TokenRuns:
    """What a chunk of one token did: the arrays that it wrote first, the runs, and which hidden buffer is newest
    then."""

    written: tuple[NDArray[Any], ...]
    runs: tuple[tuple[str, Any], ...]
    current: int
    after_coda: bool


class OnnxRuntimeState(BufferState):
    """The state of a batch in host memory. Staged data is written directly where the graph reads it."""

    def __init__(self, backend: OnnxRuntimeBackend, batch: int):
        self.backend = backend
        self._token_runs: dict[tuple[int, bool], _TokenRuns] = {}  # by loops, and whether the head runs
        self._noted: list[tuple[str, Any]] | None = None  # the runs of a chunk that is noted
        self.buffers: dict[str, NDArray[np.uint8]] = {}
        self._views: dict[tuple[str, int, tuple[int, ...]], NDArray[Any]] = {}  # cached: making a view takes long
        super().__init__(backend.package.manifest, batch)

    @property
    def computed_by(self) -> str:
        """The backend's name."""
        return self.backend.name

    def allocate(self, sizes: dict[str, int]) -> None:
        """Allocate aligned buffers and touch every page, so that memory does not grow later.

        They are one block, because NumPy asks Linux for large pages where an array is large.
        """
        places = np.cumsum([0, *(rounded_up(count, _ALIGNMENT) for count in sizes.values())]).tolist()
        raw = np.empty(places[-1] + _ALIGNMENT, np.uint8)
        raw.fill(0)
        start = -raw.ctypes.data % _ALIGNMENT
        for place, (name, count) in zip(places, sizes.items(), strict=False):
            self.buffers[name] = raw[start + place : start + place + count]

    def view(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """Return a buffer in a shape; every call returns the same memory."""
        key = (buffer, offset, shape)
        found = self._views.get(key)
        if found is None or found.dtype is not dtype:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            self._views[key] = found = np.ndarray(shape, dtype, self.buffers[buffer].data, offset)
        return found

    stage = view

    def send(self, buffer: str, count: int) -> None:
        """Do nothing: staged data is in place."""

    def copy(self, target: StridedRegion, source: StridedRegion, count: int, blocks: int) -> None:
        """Copy blocks from one buffer to another."""
        self._blocks(target, count, blocks)[...] = self._blocks(source, count, blocks)

    def fetch(self, source: StridedRegion, count: int, blocks: int) -> NDArray[np.uint8]:
        """Return a copy of a buffer's blocks."""
        return self._blocks(source, count, blocks).copy()

    def store(self, target: StridedRegion, values: NDArray[np.uint8]) -> None:
        """Copy blocks into a buffer."""
        self._blocks(target, values.shape[1], len(values))[...] = values

    def _blocks(self, region: StridedRegion, count: int, blocks: int) -> NDArray[np.uint8]:
        return np.ndarray((blocks, count), np.uint8, self.buffers[region.buffer].data, region.offset, (region.pitch, 1))

    def bind(self, graph: str, inputs: tuple[Binding, ...], outputs: tuple[Binding, ...]) -> Any:
        """Make an I/O binding of every tensor to its buffer's address."""
        binding = self.backend.sessions[graph].io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for tensor in tensors:
                address = self.buffers[tensor.buffer].ctypes.data + tensor.offset
                bind(tensor.tensor, "cpu", 0, np.dtype(tensor.dtype), tensor.shape, address)
        return binding

    def detach(self) -> None:
        """Forget runs on the buffers of the state that this one was copied from."""
        self._token_runs = {}

    def run_chunk(
        self,
        token_ids: NDArray[np.int64],
        control: LoopControl,
        loops: int,
        head: bool,
        between: Callable[[], None] | None = None,
        start: NDArray[np.float32] | None = None,
    ) -> None:
        """Run a chunk. One token after another does the same with other numbers, so its runs are noted and repeated:
        what would be looked up between them is no longer in the processor's caches."""
        ask = between is not None and loops > 1
        differs = self.masked or self.read_only or self.manifest.injects  # by the tokens in the cache, or in copies
        if token_ids.shape[1] > 1 or ask or differs:
            super().run_chunk(token_ids, control, loops, head, between, start)
            return
        values = (token_ids, control.lengths, control.chunk_lengths, *((control.active,) if self.steered else ()))
        noted = self._token_runs.get((loops, head))
        if noted is None:
            self._note(values, control, loops, head)
            return
        for array, value in zip(noted.written, values, strict=True):
            array[...] = value
        self.width = 1
        for graph, bound in noted.runs:
            self.run(graph, bound)
        self.current, self.loops_run, self.headed, self.after_coda = noted.current, loops, head, noted.after_coda

    def _note(self, values: tuple[NDArray[Any], ...], control: LoopControl, loops: int, head: bool) -> None:
        """Run one token, and note what it did."""
        runs: list[tuple[str, Any]] = []
        self._noted = runs
        try:
            super().run_chunk(values[0], control, loops, head)
        finally:
            self._noted = None
        names = ("input_ids", *(self.prefix + name for name in ("lengths", "chunk_lengths", "active")))
        written = tuple(self.stage(name, value.dtype, value.shape) for name, value in zip(names, values, strict=False))
        if len(self._token_runs) >= _MAX_NOTED:
            self._token_runs.clear()
        self._token_runs[loops, head] = _TokenRuns(written, tuple(runs), self.current, self.after_coda)

    def run(self, graph: str, bound: Any) -> None:
        """Run a graph on its bound buffers."""
        if self._noted is not None:
            self._noted.append((graph, bound))
        limit, session = self.backend.thread_limit, self.backend.sessions[graph]
        if limit is None or perf_counter() < limit.quiet_until:
            run_bound(session, graph, bound)
            return
        limit.before(self.width)
        started = perf_counter()
        run_bound(session, graph, bound)
        if self.width == 1 and graph == "loop_step":
            limit.decoded(perf_counter() - started)

    def bucket(self, positions: int) -> int:
        """Round up to a multiple of a fixed length, so that few shapes are bound."""
        return rounded(positions, self.manifest.cache_rows)

    def logits_of_many(self, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits of several columns in one run, with its own buffers."""
        shape = (self.batch, self.width, int(self.hidden.shape[-1]))
        hidden = self.view(self.head_source, np.dtype(self.hidden.dtype), shape)
        rows = np.take_along_axis(hidden, columns[..., None], axis=1)
        return cast(NDArray[np.float32], self.backend.sessions["lm_head"].run(["logits"], {"hidden": rows})[0])


def _tensor(value: Any) -> TensorSpec:
    """Describe a session's input or output; a dimension without size or name becomes "?"."""
    element = str(value.type).removeprefix("tensor(").removesuffix(")")
    shape = tuple("?" if dim is None else dim for dim in value.shape or ())
    return TensorSpec(value.name, _ELEMENTS.get(element, element), shape)


def run_bound(session: Any, graph: str, binding: Any) -> None:
    """Run a session on its binding and wait for it. Raises BackendError."""
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise BackendError(f"ONNX Runtime failed in {graph}: {brief(error)}") from error


def rounded(positions: int, most: int) -> int:
    """Round positions up to an attention length."""
    return min(rounded_up(positions, CONTEXT_BUCKET), most)
