"""Runs the engines of a package with TensorRT or TensorRT-RTX; a token never leaves the device before it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..engines.library import Library, open_library
from ..engines.profiles import bucket_for, profile_for
from ..engines.store import engine_spec, fitting_engine, open_engine
from ..errors import ArgumentError, BackendError
from ..package.reader import Package, source_hash
from ..sampling.top_candidates import Candidates
from .base import LoopControl
from .bindings import Binding, Bindings, slot_bytes, state_buffers
from .buffers import BufferState, Strip
from .cuda import Device, open_device
from .execution import Bound, Contexts, Plan, Recordings, single_sizes

_ALIGNMENT = 256  # of every buffer, as TensorRT asks for


class TensorRTBackend:
    """An engine of a package on a device.

    ``engine``: its name in the manifest; None: the first that is for a library here and this device. ``graphs`` False
    runs everything plainly, without captured CUDA graphs, for comparison.
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
        self.plans = {
            name: Plan(self.library, runtime, name, specs[name], path, streamed, fixed) for name, path in plans.items()
        }

    @property
    def max_batch(self) -> int:
        """The most sequences of a batch: what the engine was built for."""
        return self.spec.profiles[-1].batch[2]

    def available_bytes(self) -> int | None:
        """Free memory of the device."""
        return self.device.memory()[0]

    def open_state(self, batch: int) -> TensorRTState:
        """Allocates all state of a batch. Raises ArgumentError above the engine's batch, BackendError."""
        most = self.max_batch
        if not 1 <= batch <= most:
            raise ArgumentError(f"batch is {batch}; engine {self.engine} was built for 1 to {most} sequences")
        return TensorRTState(self, batch)


def choose_engine(package: Package, engine: str | None, capability: str) -> tuple[str, Library]:
    """An engine's name and the library for it. Raises PackageError, BackendError.

    A named one's library must be there, and ``open_engine`` checks the rest; so it is with the only one. Of several,
    ``fitting_engine`` says which; where it finds none, the error says why of each.
    """
    engines = package.manifest.engines
    if engine is None and len(engines) == 1:
        engine = next(iter(engines))
    if engine is not None:
        return engine, open_library(engine_spec(package, engine).flavour)
    libraries: dict[str, Library] = {}
    for flavour in {spec.flavour for spec in engines.values()}:
        with suppress(BackendError):
            libraries[flavour] = open_library(flavour)
    versions = {flavour: library.version for flavour, library in libraries.items()}
    name, wrong = fitting_engine(engines, source_hash(package.manifest), versions, capability)
    if name is None:
        reasons = "; ".join(f"{name} {reason}" for name, reason in wrong.items())
        raise BackendError(f"no engine of {package.directory} runs here: {reasons}")
    return name, libraries[engines[name].flavour]


def layout(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Where buffers lie in one block, each aligned, and the bytes of the block."""
    offsets, total = {}, 0
    for name, count in sizes.items():
        offsets[name] = total
        total += -(-count // _ALIGNMENT) * _ALIGNMENT
    return offsets, total


def require_memory(device: Device, batch: int, state: int, scratch: int, total: int) -> None:
    """Refuses a state that the device has no room for. Raises BackendError with what it needs and what is free."""
    free, _ = device.memory()
    if total > free:
        raise BackendError(
            f"a batch of {batch} needs {total:,} bytes of device memory ({state:,} of state, {scratch:,} of the "
            f"engine's scratch), {free:,} are free on {device.name}; use a smaller batch"
        )


@dataclass
class _Reading:
    """What a state and its parts share: whether the device may still read their pinned memory."""

    unread: bool = False


class TensorRTState(BufferState):
    """The buffers of one batch in one block of device memory, and its twin in pinned memory for what the host touches.

    What is staged is uploaded with the next run, and so becomes part of a captured graph; ``first_loop`` is not
    staged at all: loop 0 reads one constant buffer and all others another.
    """

    def __init__(self, backend: TensorRTBackend, batch: int):
        self.backend, self.device, self.spec = backend, backend.device, backend.spec
        self.likeliest = backend.plans["lm_head"].likeliest  # 0: none
        self._pending: dict[str, int] = {}  # staged and not yet uploaded: buffer, bytes
        self._fresh: tuple[str, ...] = ()  # buffers on whose download the stream already works
        self._reading = _Reading()
        super().__init__(backend.package.manifest, batch)
        self._upload()
        contexts = partial(Contexts, backend.plans, self.stream, self.address("engine scratch"))
        self._plain = contexts()
        self._recordings = Recordings(self.stream, contexts)
        self._running = self._plain

    @property
    def computed_by(self) -> str:
        """The backend's name and the hashes of the engine's plans."""
        return " ".join([self.backend.name, *(self.spec.files[graph].sha256 for graph in sorted(self.spec.files))])

    def part(self, first: int, count: int) -> Self | None:
        """As the base says; None where a slot's caches do not begin at an address that TensorRT takes. Contexts and
        captured graphs are shared with the whole, so parts take no device memory either."""
        if any(step % _ALIGNMENT for step in slot_bytes(self.manifest).values()):
            return None
        made = super().part(first, count)
        assert made is not None
        made._pending, made._fresh = {}, ()
        return made

    def allocate(self, sizes: dict[str, int]) -> None:
        """One block on the device and one of pinned memory, after a look at what is free."""
        state = set(state_buffers(self.manifest, self.batch))
        scratch = max(plan.scratch_bytes for plan in self.backend.plans.values())
        if self.likeliest:
            few = {"top_logits": 4 * self.likeliest, "top_ids": 4 * self.likeliest, "log_sum": 4}
            sizes = {**sizes, **{name: self.batch * count for name, count in few.items()}}
        self._offsets, total = layout({**sizes, "engine scratch": scratch})
        shared = {name: count for name, count in sizes.items() if name not in state and name != "head_hidden"}
        self._pinned_offsets, pinned = layout(shared)
        require_memory(self.device, self.batch, self.state_bytes, scratch, total)
        self.stream = self.device.stream()
        self._memory = self.device.allocate(total)
        try:
            self._pinned = self.device.pinned(pinned)
        except BackendError:
            self._memory.free()
            raise
        self.device_bytes = total
        self._host = self._pinned.array()
        self._host[...] = 0
        self.stream.fill(self._memory.address, 0, total)
        self.stream.synchronize()

    def address(self, buffer: str) -> int:
        """Where a buffer lies on the device."""
        return self._memory.address + self._offsets[buffer]

    def stage(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Pinned memory, once the device no longer reads it."""
        if self._reading.unread:
            self._wait()
        return self._twin(buffer, dtype, shape)

    def send(self, buffer: str, count: int) -> None:
        """Uploaded with the next run."""
        self._pending[buffer] = count

    def view(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Brings a buffer's front to the host and waits for it: to pinned memory, or for a state to an array."""
        if buffer in self._pinned_offsets:
            values = self._twin(buffer, dtype, shape)
            if buffer not in self._fresh:
                self.stream.copy(values.ctypes.data, self.address(buffer), values.nbytes)
        else:
            values, at = np.empty(shape, dtype), self.offsets.get(buffer, 0)
            self.stream.copy(values.ctypes.data, self.address(buffer) + at, values.nbytes)
        self._wait()
        return values

    def copy(self, target: Strip, source: Strip, count: int, pieces: int) -> None:
        """One strided copy on the device."""
        to, of = (self.address(strip.buffer) + strip.offset for strip in (target, source))
        self.stream.copy_pieces(to, target.pitch, of, source.pitch, count, pieces)

    def fetch(self, source: Strip, count: int, pieces: int) -> NDArray[np.uint8]:
        """Brings pieces of a buffer to the host and waits for them."""
        self.device.use()
        values, begin = np.empty((pieces, count), np.uint8), self.address(source.buffer) + source.offset
        self.stream.copy_pieces(values.ctypes.data, count, begin, source.pitch, count, pieces)
        self._wait()
        return values

    def store(self, target: Strip, values: NDArray[np.uint8]) -> None:
        """Takes pieces of the host into a buffer and waits until they are there."""
        self.device.use()
        begin, count = self.address(target.buffer) + target.offset, values.shape[1]
        self.stream.copy_pieces(begin, target.pitch, values.ctypes.data, count, count, len(values))
        self._wait()

    def bind(self, graph: str, inputs: tuple[Binding, ...], outputs: tuple[Binding, ...]) -> Bound:
        """Shapes, addresses and profile."""
        width = next((b.shape[1] for b in inputs if b.tensor in ("input_ids", "active", "hidden")), 1)
        context = next((b.shape[-1] for b in inputs if b.tensor == "attention_mask"), self.spec.buckets[0])
        profile = profile_for(self.spec.profiles, self.batch, width, context)
        return Bound.of(graph, profile, (inputs, outputs), self.address)

    def run(self, graph: str, bound: Bound) -> None:
        """Puts a run on the stream, after what was staged."""
        self.device.use()
        self._upload()
        self._running.run(bound)

    def bucket(self, rows: int) -> int:
        """The engine's next attention length."""
        return bucket_for(self.spec.buckets, rows)

    def embed(self, token_ids: NDArray[np.int64]) -> None:
        """token_ids (batch, chunk) -> hidden."""
        self._begin(token_ids.shape[1])
        super().embed(token_ids)

    def loop(self, control: LoopControl) -> NDArray[np.float32]:
        """One loop step over the chunk: for one token from a graph, one for each side of the swap."""
        self.headed, before = False, self.current
        width, context, first_loop = self.prepare(control)

        def work() -> None:
            self.run_loop(width, context, first_loop)
            self._download("exit_probability", 4 * self.batch * width)

        self._perform(("loop", width, context, first_loop, before), width, work)
        self.current, self._fresh = 1 - before, ("exit_probability",)
        return self._exits()

    def run_chunk(
        self,
        token_ids: NDArray[np.int64],
        control: LoopControl,
        loops: int,
        head: bool,
        between: Callable[[], None] | None = None,
    ) -> None:
        """A chunk; of one token, embedding, loops, head and the likeliest few are one graph, with nothing between."""
        self._begin(token_ids.shape[1])
        self.width = token_ids.shape[1]
        self.put("input_ids", token_ids)
        width, context, first_loop = self.prepare(control)
        head = head and width == 1

        def work() -> None:
            self.current = 0
            self.run_embed()
            for loop in range(loops):
                self.run_loop(width, context, first_loop if loop == 0 else "first_loop/0")
            if head:
                self.run_head()
                for name in self._few():
                    self._download(name, self.batch * (4 if name == "log_sum" else 4 * self.likeliest))

        self._perform(("chunk", width, context, loops, head), width, work)
        self.current = loops % 2
        self.headed, self._fresh = head, self._few() if head else ()
        self.commit(control)

    def head_bindings(self, hidden: str) -> Bindings:
        """The head also gives the likeliest tokens, where the engine was built so."""
        inputs, outputs = super().head_bindings(hidden)
        k = self.likeliest
        few = {"top_logits": ("float32", k), "top_ids": ("int32", k), "log_sum": ("float32", 1)}
        more = tuple(Binding(name, name, *(few[name][0], (self.batch, 1, few[name][1]))) for name in self._few())
        return inputs, outputs + more

    def candidates(self, columns: NDArray[np.int64]) -> list[Candidates] | None:
        """The likeliest tokens after columns (batch, 1); None for an engine that does not pick them out."""
        if not self.likeliest:
            return None
        if not self.headed:
            self.gather(columns[:, 0])
            self.run_head()
        shape = (self.batch, self.likeliest)
        logits = self.view("top_logits", np.dtype(np.float32), shape).copy()
        ids = self.view("top_ids", np.dtype(np.int32), shape).copy()
        sums = self.view("log_sum", np.dtype(np.float32), (self.batch,)).tolist()
        return [Candidates(logits[slot], ids[slot], sums[slot], self.manifest.vocab_size) for slot in range(self.batch)]

    def captured(self) -> list[Any]:
        """The keys of all captured graphs."""
        return self._recordings.captured()

    def __del__(self) -> None:
        """Graphs and contexts go before the memory that they point into."""
        for name in ("_recordings", "_running", "_plain", "_memory"):
            self.__dict__.pop(name, None)

    def _begin(self, width: int) -> None:
        """Refuses what the engine was not built for, before anything changes."""
        profile_for(self.spec.profiles, self.batch, width, self.spec.buckets[-1])
        self.headed, self._fresh, self._pending = False, (), {}

    def _perform(self, key: tuple[Any, ...], width: int, work: Any) -> None:
        """Runs work plainly, or for one token from a graph. What was staged is part of it, and so of its key."""
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
        self._pending, self._reading.unread = {}, True

    def _upload(self) -> None:
        for name, count in self._pending.items():
            self.stream.copy(self.address(name), self._pinned.address + self._pinned_offsets[name], count)
        self._reading.unread = self._reading.unread or bool(self._pending)
        self._pending = {}

    def _download(self, buffer: str, count: int) -> None:
        self.stream.copy(self._pinned.address + self._pinned_offsets[buffer], self.address(buffer), count)

    def _wait(self) -> None:
        self.stream.synchronize()
        self._reading.unread = False

    def _twin(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The front of a buffer's pinned twin in a shape."""
        return np.ndarray(shape, dtype, self._host.data, self._pinned_offsets[buffer])

    def _few(self) -> tuple[str, ...]:
        return ("top_logits", "top_ids", "log_sum") if self.likeliest else ()
