"""Run a package's engines with TensorRT or TensorRT-RTX; all work of a token stays on the device until it is
sampled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..engines.library import Library, open_libraries, open_library
from ..engines.profiles import bucket_for, profile_for
from ..engines.store import engine_spec, open_engine
from ..errors import ArgumentError, BackendError
from ..package.engine_spec import fitting_engine
from ..package.reader import Package, source_hash
from ..sampling.top_candidates import Candidates
from .bindings import LANES, Binding, Bindings, lane_window, slot_bytes, state_buffers
from .buffers import BufferState
from .control import LoopControl
from .cuda import open_device
from .device_memory import ALIGNMENT, DeviceBuffers
from .execution import Bound, Contexts, GraphEngine, Recordings, single_sizes
from .positions import StridedRegion


class TensorRTBackend:
    """An engine of a package on a device.

    ``engine``: its name in the manifest; None: the first that fits library and device. ``graphs`` False: never capture
    CUDA graphs, for comparison.
    """

    name = "tensorrt"

    def __init__(
        self,
        package: Package,
        engine: str | None = None,
        device: int = 0,
        *,
        graphs: bool = True,
        check_hashes: bool = True,
    ):
        self.package, self.graphs = package, graphs
        if engine is not None or not package.manifest.engines:
            engine_spec(package, engine or "tensorrt")
        self.device = open_device(device)
        name, self.library = choose_engine(package, engine, self.device.capability)
        self.engine, self.spec = name, engine_spec(package, name)
        plans = open_engine(
            package,
            name,
            flavour=self.library.flavour,
            version=self.library.version,
            capability=self.device.capability,
            check_hashes=check_hashes,
        )
        streamed = bool(self.spec.options.get("weight_streaming"))
        free, _ = self.device.memory()
        if self.spec.bytes > free and not streamed:
            raise BackendError(
                f"engine {name} needs {self.spec.bytes:,} bytes of device memory for its weights, {free:,} are free "
                f"on {self.device.name}; build one with --weights int4 or --weight-streaming"
            )
        self.device.use()
        self.library.messages.clear()
        runtime = self.library.module.Runtime(self.library.logger)
        specs, fixed = package.manifest.graphs, single_sizes(self.spec.profiles)
        self.graph_engines = {
            name: GraphEngine(self.library, runtime, name, specs[name], path, streamed, fixed)
            for name, path in plans.items()
        }

    @property
    def max_batch(self) -> int:
        """The most sequences in a batch: as the engine was built."""
        return self.spec.profiles[-1].batch[2]

    def available_bytes(self) -> int | None:
        """Return the device's free memory in bytes."""
        return self.device.memory()[0]

    def open_state(self, batch: int) -> TensorRTState:
        """Allocate all state of a batch. Raises ArgumentError above the engine's batch, BackendError."""
        most = self.max_batch
        if not 1 <= batch <= most:
            raise ArgumentError(f"batch is {batch}; engine {self.engine} was built for 1 to {most} sequences")
        return TensorRTState(self, batch)


def choose_engine(package: Package, engine: str | None, capability: str) -> tuple[str, Library]:
    """Return an engine's name and its library. Raises PackageError, BackendError.

    A named or only engine needs its library; ``open_engine`` checks the rest. Of several, ``fitting_engine`` chooses;
    if none fits, the error says why for each.
    """
    engines = package.manifest.engines
    if engine is None and len(engines) == 1:
        engine = next(iter(engines))
    if engine is not None:
        return engine, open_library(engine_spec(package, engine).flavour)
    libraries = open_libraries(spec.flavour for spec in engines.values())
    versions = {flavour: library.version for flavour, library in libraries.items()}
    name, wrong = fitting_engine(engines, source_hash(package.manifest), versions, capability)
    if name is None:
        reasons = "; ".join(f"{name} {reason}" for name, reason in wrong.items())
        raise BackendError(f"no engine of {package.directory} runs here: {reasons}")
    return name, libraries[engines[name].flavour]


class TensorRTState(BufferState):
    """The state of a batch in one block of device memory, with pinned staging buffers.

    Staged data is uploaded with the next run, and so is part of a captured graph. ``first_loop`` is not staged: loop 0
    reads one constant buffer and later loops another.
    """

    alignment = ALIGNMENT
    narrow_lanes = False  # each range of loops would be another captured graph

    def __init__(self, backend: TensorRTBackend, batch: int):
        self.backend, self.device, self.spec = backend, backend.device, backend.spec
        self.candidate_count = backend.graph_engines["lm_head"].candidate_count  # 0: the engine selects none
        self._pending: dict[str, int] = {}  # staged but not uploaded: buffer -> bytes
        self._fresh: tuple[str, ...] = ()  # buffers whose download is already queued
        super().__init__(backend.package.manifest, batch)
        self._upload()
        contexts = partial(Contexts, backend.graph_engines, self.stream, self.buffers.address("engine scratch"))
        self._plain = contexts()
        self._recordings = Recordings(self.stream, contexts)
        self._running = self._plain

    @property
    def computed_by(self) -> str:
        """The backend's name and the hashes of the engine's plans."""
        return " ".join([self.backend.name, *(self.spec.files[graph].sha256 for graph in sorted(self.spec.files))])

    def part(self, first: int, count: int) -> Self | None:
        """Return a part as the base class does; None if a slot's caches are not aligned for TensorRT.

        Contexts and captured graphs are shared with the whole, so a part takes no device memory.
        """
        if any(step % ALIGNMENT for step in slot_bytes(self.manifest).values()):
            return None
        made = super().part(first, count)
        assert made is not None
        return made

    def detach(self) -> None:
        """Begin without staged data and queued downloads."""
        self._pending, self._fresh = {}, ()

    def lanes_fit(self) -> str | None:
        """Return why one run cannot hold a token of every sequence in every loop, or None."""
        window, loops = lane_window(self.manifest), self.manifest.cache_loops
        sizes = [(self.batch, window), (self.batch * window, 1)] if loops is None else [(self.batch * loops, 1)]
        if loops is not None and self.manifest.has_coda:
            sizes.append((self.batch, window))
        try:
            for batch, chunk in sizes:
                profile_for(self.spec.profiles, batch, chunk, self.spec.buckets[-1])
        except ArgumentError as error:
            return str(error)
        return super().lanes_fit()

    def lane_outputs(self) -> tuple[str, ...]:
        """Return the names of the engine's candidate outputs."""
        return self._top_outputs()

    def perform(self, key: tuple[Any, ...], work: Callable[[], None]) -> None:
        """Run several graphs over one token per row, from a captured graph."""
        self._perform(key, 1, work)

    def allocate(self, sizes: dict[str, int]) -> None:
        """Allocate one block on the device and one of pinned memory, if enough is free."""
        state = set(state_buffers(self.manifest, self.batch))
        scratch = max(engine.scratch_bytes for engine in self.backend.graph_engines.values())
        if self.candidate_count:
            sizes_of_top = {"top_logits": 4 * self.candidate_count, "top_ids": 4 * self.candidate_count, "log_sum": 4}
            sizes = {**sizes, **{name: self.batch * count for name, count in sizes_of_top.items()}}
            rows = self.batch * lane_window(self.manifest)
            sizes |= {LANES + name: rows * count for name, count in sizes_of_top.items()}
        self.buffers = DeviceBuffers(
            self.device,
            {**sizes, "engine scratch": scratch},
            [name for name in sizes if name not in state and name != "head_hidden"],
            f"a batch of {self.batch}",
            f" ({self.state_bytes:,} of state, {scratch:,} of the engine's scratch)",
        )
        self.stream = self.buffers.stream

    def stage(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return pinned memory, once the device no longer reads it."""
        if self.buffers.reading:
            self.buffers.wait()
        return self.buffers.host(buffer, dtype, shape)

    def send(self, buffer: str, count: int) -> None:
        """Mark staged data for upload with the next run."""
        self._pending[buffer] = count

    def view(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """Download a buffer's contents and wait: to pinned memory, or for a state to a new array."""
        if buffer in self._fresh:
            self.buffers.wait()
            return self.buffers.host(buffer, dtype, shape)
        return self.buffers.download(buffer, dtype, shape, offset)

    def copy(self, target: StridedRegion, source: StridedRegion, count: int, blocks: int) -> None:
        """Queue a copy of blocks on the device."""
        self.buffers.queue_copy(target, source, count, blocks)

    def fetch(self, source: StridedRegion, count: int, blocks: int) -> NDArray[np.uint8]:
        """Download blocks of a buffer and wait."""
        return self.buffers.fetch(source, count, blocks)

    def store(self, target: StridedRegion, values: NDArray[np.uint8]) -> None:
        """Upload blocks into a buffer and wait."""
        self.buffers.store(target, values)

    def bind(self, graph: str, inputs: tuple[Binding, ...], outputs: tuple[Binding, ...]) -> Bound:
        """Collect shapes, addresses and profile."""
        width = next((b.shape[1] for b in inputs if b.tensor in ("input_ids", "active", "hidden")), 1)
        context = next((b.shape[-1] for b in inputs if b.tensor == "attention_mask"), self.spec.buckets[0])
        profile = profile_for(self.spec.profiles, self.batch, width, context, bool(self.prefix))
        return Bound.of(graph, profile, (inputs, outputs), self.buffers.address)

    def run(self, graph: str, bound: Bound) -> None:
        """Upload staged data and queue a run."""
        self.device.use()
        self._upload()
        self._running.run(bound)

    def bucket(self, positions: int) -> int:
        """Return the engine's next attention length."""
        return bucket_for(self.spec.buckets, positions)

    def embed(
        self,
        token_ids: NDArray[np.int64],
        control: LoopControl | None = None,
        start: NDArray[np.float32] | None = None,
    ) -> None:
        """Embed token_ids (batch, chunk)."""
        self._begin(token_ids.shape[1])
        super().embed(token_ids, control, start)

    def loop(self, control: LoopControl) -> NDArray[np.float32] | None:
        """Run one loop step over the chunk; for one token from a captured graph, one for each side of the swap."""
        self.headed, self.after_coda, before, ran = False, False, self.current, self.loops_run
        width, context, first_loop = self.prepare(control)

        def work() -> None:
            self.run_loop(width, context, first_loop)
            if self.manifest.has_exit_gate:
                self.buffers.queue_download("exit_probability", 4 * self.batch * width)

        of_loop = ran if self.manifest.cache_loops else 0  # whose caches are bound
        self._perform(("loop", width, context, first_loop, before, of_loop), width, work)
        self.current, self.loops_run = 1 - before, ran + 1
        if not self.manifest.has_exit_gate:
            return None
        self._fresh = ("exit_probability",)
        return self._exits()

    def run_chunk(
        self,
        token_ids: NDArray[np.int64],
        control: LoopControl,
        loops: int,
        head: bool,
        between: Callable[[], None] | None = None,
        start: NDArray[np.float32] | None = None,
    ) -> None:
        """Run a chunk. For one token, all graphs and the top candidates are one captured graph."""
        self._begin(token_ids.shape[1])
        self.width = token_ids.shape[1]
        self.put("input_ids", token_ids)
        self.put_start(start)
        width, context, first_loop = self.prepare(control)
        head, started = head and width == 1, start is not None

        def work() -> None:
            self.current = self.loops_run = 0
            self.run_embed(context if self.manifest.has_prelude else 0)
            self.begin_hidden(started)
            for loop in range(loops):
                self.run_loop(width, context, first_loop if loop == 0 else "first_loop/0")
            if self.manifest.has_coda:
                self.run_coda(width, context)
            if head:
                self.run_head()
                for name in self._top_outputs():
                    self.buffers.queue_download(
                        name, self.batch * (4 if name == "log_sum" else 4 * self.candidate_count)
                    )

        self._perform(("chunk", width, context, loops, head), width, work)
        self.current, self.loops_run, self.after_coda = loops % 2, loops, self.manifest.has_coda
        self.headed, self._fresh = head, self._top_outputs() if head else ()
        self.commit(control)

    def head_bindings(self, hidden: str) -> Bindings:
        """Bind the head, including the candidate outputs if the engine has them."""
        inputs, outputs = super().head_bindings(hidden)
        k = self.candidate_count
        sizes_of_top = {"top_logits": ("float32", k), "top_ids": ("int32", k), "log_sum": ("float32", 1)}
        more = tuple(
            Binding(name, name, *(sizes_of_top[name][0], (self.batch, 1, sizes_of_top[name][1])))
            for name in self._top_outputs()
        )
        return inputs, outputs + more

    def candidates(self, columns: NDArray[np.int64]) -> list[Candidates] | None:
        """Return the top candidates after columns (batch, 1); None if the engine does not select them."""
        if not self.candidate_count:
            return None
        if not self.headed:
            self.gather(columns[:, 0])
            self.run_head()
        shape = (self.batch, self.candidate_count)
        logits = self.view("top_logits", np.dtype(np.float32), shape).copy()
        ids = self.view("top_ids", np.dtype(np.int32), shape).copy()
        sums = self.view("log_sum", np.dtype(np.float32), (self.batch,)).tolist()
        return [Candidates(logits[slot], ids[slot], sums[slot], self.manifest.vocab_size) for slot in range(self.batch)]

    def captured(self) -> list[Any]:
        """Return the keys of all captured graphs."""
        return self._recordings.captured()

    def __del__(self) -> None:
        """Free graphs and contexts before the memory that they refer to."""
        for name in ("_recordings", "_running", "_plain", "buffers"):
            self.__dict__.pop(name, None)

    def _begin(self, width: int) -> None:
        """Refuse widths that the engine was not built for, before any change."""
        profile_for(self.spec.profiles, self.batch, width, self.spec.buckets[-1])
        self.headed, self._fresh, self._pending = False, (), {}

    def _perform(self, key: tuple[Any, ...], width: int, work: Any) -> None:
        """Run work directly, or for one token from a captured graph. Staged data is part of the work and of its key."""
        self.device.use()
        staged = dict(self._pending)

        def from_staged(contexts: Contexts) -> None:
            self._pending, self._running = dict(staged), contexts
            try:
                work()
            finally:
                self._running = self._plain

        if width == 1 and self.backend.graphs:
            self._recordings.play((*key, self.first, self.batch, *staged.items()), from_staged)
        else:
            from_staged(self._plain)
        self._pending, self.buffers.reading = {}, True

    def _upload(self) -> None:
        for name, count in self._pending.items():
            self.buffers.queue_upload(name, count)
        self._pending = {}

    def _top_outputs(self) -> tuple[str, ...]:
        return ("top_logits", "top_ids", "log_sum") if self.candidate_count else ()
