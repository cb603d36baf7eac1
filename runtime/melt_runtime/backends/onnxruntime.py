"""Runs a package with ONNX Runtime on the CPU. Every buffer is bound by address; nothing is copied between loops."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, BackendError
from ..package import GRAPHS, Package, StateSpec, rows_shape, size_of
from . import LoopControl

# Attention over a growing cache: its width is rounded up, so that few shapes are ever bound.
CONTEXT_BUCKET = 64
_MAX_BINDINGS = 32


class OnnxRuntimeBackend:
    """A package's three graphs as ONNX Runtime sessions."""

    name = "onnxruntime"

    def __init__(self, package: Package, threads: int | None = None, low_memory: bool = False):
        self.package, self.low_memory = package, low_memory
        if package.manifest.precision == "bf16":
            raise BackendError("ONNX Runtime has no bf16 kernels for the CPU; export this checkpoint as fp32 or fp16")
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(
                "ONNX Runtime is not installed; install it with: pip install melt-export[cpu]"
            ) from error
        self.ort: Any = onnxruntime
        most = 4 * (os.cpu_count() or 1)
        if threads is not None and not 1 <= threads <= most:
            raise ArgumentError(f"threads is {threads}; on this machine it must lie between 1 and {most}")
        self.sessions = {name: self._session(name, threads) for name in GRAPHS}

    def _session(self, graph: str, threads: int | None) -> Any:
        options = self.ort.SessionOptions()
        options.log_severity_level = 3
        if self.low_memory:
            # Nothing is widened, packed or kept ahead of its use: weights stay mapped from disk as they are stored.
            options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_mem_pattern = options.enable_cpu_mem_arena = False
            options.execution_order = self.ort.ExecutionOrder.PRIORITY_BASED  # widens a weight just before its use
            options.add_session_config_entry("session.disable_prepacking", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            return self.ort.InferenceSession(str(self.package.path(graph)), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load {graph}.onnx: {_one_line(error)}") from error

    def open_state(self, batch: int) -> OnnxRuntimeState:
        """Allocates all state of a batch. Raises ArgumentError above the package's max_batch, BackendError."""
        manifest = self.package.manifest
        if not 1 <= batch <= manifest.max_batch:
            raise ArgumentError(f"batch is {batch}; this package was exported for 1 to {manifest.max_batch} sequences")
        try:
            return OnnxRuntimeState(self, batch)
        except MemoryError as error:
            need = manifest.state_bytes(batch)
            raise BackendError(f"there is no memory for {need:,} bytes of state; use a smaller batch") from error


class OnnxRuntimeState:
    """The buffers of one batch. Caches have one buffer, bound as input and output; hidden and latent have two."""

    def __init__(self, backend: OnnxRuntimeBackend, batch: int):
        manifest = backend.package.manifest
        self.backend, self.manifest, self.batch = backend, manifest, batch
        self.chunk = manifest.chunk
        self.width = 1  # columns of the chunk that was embedded last
        self.current = 0  # which of the two swap buffers holds the newest hidden and latent
        self.buffers: dict[str, NDArray[np.uint8]] = {}
        for state in manifest.states:
            shapes = {state.input: state.shape}
            if state.kind == "swap":
                shapes = {f"{state.input}/0": state.shape, f"{state.input}/1": state.shape}
            elif state.kind == "read_only":
                shapes[state.output] = rows_shape(state.shape)
            for name, shape in shapes.items():
                self.buffers[name] = self._allocate(size_of(shape, state.dtype, batch=batch, chunk=self.chunk))
        self.state_bytes = sum(buffer.nbytes for buffer in self.buffers.values())

        self.hidden = manifest.states[0]
        self.loops_run = 0  # of the open chunk: which of a LoopLM's caches is bound next
        self.inputs = {spec.name for spec in manifest.graphs["loop_step"].inputs}
        self.masked = "attention_mask" in self.inputs
        self.dtype = np.dtype(self.hidden.dtype)
        self._scratch = {
            "first_loop": np.zeros(batch, np.bool_),
            "active": np.zeros(batch * self.chunk, np.bool_),
            "lengths": np.zeros(batch, np.int64),
            "chunk_lengths": np.zeros(batch, np.int64),
            "exit_probability": np.zeros(batch * self.chunk, np.float32),
            "input_ids": np.zeros(batch * self.chunk, np.int64),
            "head_hidden": np.zeros((batch, 1, int(self.hidden.shape[-1])), self.dtype),
            "logits": np.zeros((batch, 1, manifest.vocab_size), np.float32),
            "attention_mask": np.zeros(batch * self.chunk * manifest.cache_rows if self.masked else 0, np.bool_),
        }
        self._bindings: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._head = self._bind(
            "lm_head", {"hidden": self._scratch["head_hidden"]}, {"logits": self._scratch["logits"]}
        )

    @staticmethod
    def _allocate(count: int) -> NDArray[np.uint8]:
        """Zeroed, aligned, and really there: touching every page now keeps memory flat later."""
        raw = np.empty(count + 64, np.uint8)
        start = -raw.ctypes.data % 64
        buffer = raw[start : start + count]
        buffer.fill(0)
        return buffer

    def embed(self, token_ids: NDArray[np.int64]) -> None:
        """token_ids (batch, chunk) -> hidden."""
        self.width = width = token_ids.shape[1]
        self._view("input_ids", (self.batch, width))[...] = token_ids
        self.current = self.loops_run = 0
        key = ("embed", width)
        if key not in self._bindings:
            ids = self._view("input_ids", (self.batch, width))
            self._remember(key, self._bind("embed", {"input_ids": ids}, {"hidden": self._state(self.hidden, 0, width)}))
        self._run("embed", self._bindings[key])

    def loop(self, control: LoopControl) -> NDArray[np.float32]:
        """One loop step over the chunk. Returns the exit probability (batch, chunk)."""
        width = control.active.shape[1]
        context = self._context(control)
        self._scratch["first_loop"][...] = control.first_loop
        self._view("active", (self.batch, width))[...] = control.active
        self._scratch["lengths"][...] = control.lengths
        self._scratch["chunk_lengths"][...] = control.chunk_lengths
        if self.masked and control.first_loop.any():
            self._write_mask(control, width, context)
        cache = self.loops_run if self.manifest.cache_loops else 0
        key = ("loop_step", self.current, width, context, cache)
        if key not in self._bindings:
            self._remember(key, self._bind_loop(self.current, width, context, cache))
        self._run("loop_step", self._bindings[key])
        self.current = 1 - self.current
        self.loops_run += 1
        return self._view("exit_probability", (self.batch, width))

    def commit(self, control: LoopControl) -> None:
        """Copies the chunk's rows into read-only caches; the other dialects wrote them in the graph."""
        width = control.active.shape[1]
        for state in self.manifest.states:
            if state.kind != "read_only":
                continue
            cache = self._array(state.input, state.shape, state.dtype, width)
            rows = self._array(state.output, rows_shape(state.shape), state.dtype, width)
            for slot, (at, count) in enumerate(zip(control.lengths, control.chunk_lengths, strict=True)):
                cache[slot, :, at : at + count] = rows[slot, :, :count]

    def logits(self, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of columns (batch, n) of the chunk -> (batch, n, vocab). One column reuses its buffers."""
        hidden = self._state(self.hidden, self.current, self.width)
        rows = np.take_along_axis(hidden, columns[..., None], axis=1)
        if columns.shape[1] == 1:
            self._scratch["head_hidden"][...] = rows
            self._run("lm_head", self._head)
            return cast(NDArray[np.float32], self._scratch["logits"])
        return cast(NDArray[np.float32], self.backend.sessions["lm_head"].run(["logits"], {"hidden": rows})[0])

    def exit_probability(self) -> NDArray[np.float32]:
        """A copy of what the last loop step returned, (batch, chunk)."""
        return cast(NDArray[np.float32], self._view("exit_probability", (self.batch, self.width)).copy())

    def read(self, name: str, index: Any = ...) -> NDArray[Any]:
        """A copy of a state, or of the part at ``index``, by its name in the manifest.

        An input name gives the state itself: hidden (batch, chunk, d), latent (layers, batch, chunk, d), a cache
        (batch, kv_heads, rows, head_dim), a LoopLM's with the loops in front; the output name of a read-only cache
        gives the chunk's new rows.
        """
        for state in self.manifest.states:
            if name == state.input and state.kind == "swap":
                return self._state(state, self.current, self.width)[index].copy()
            if name == state.input:
                return self._array(name, state.shape, state.dtype, self.width)[index].copy()
            if name == state.output and state.kind == "read_only":
                return self._array(name, rows_shape(state.shape), state.dtype, self.width)[index].copy()
        raise ArgumentError(f"the package has no state {name!r}")

    def _context(self, control: LoopControl) -> int:
        """How many rows of the cache the attention reads, for the dialects with a mask; else 0."""
        if not self.masked:
            return 0
        own = 0 if self.manifest.dialect == "portable" else control.active.shape[1]
        needed = int(control.lengths.max()) + own
        rounded = -(-max(needed, 1) // CONTEXT_BUCKET) * CONTEXT_BUCKET
        return min(rounded, self.manifest.cache_rows)

    def _write_mask(self, control: LoopControl, width: int, context: int) -> None:
        """Who sees what: (batch, 1, chunk, context). In the portable dialect the chunk's own rows are not in it."""
        mask = self._view("attention_mask", (self.batch, 1, width, context))
        row = np.arange(context)
        seen = np.repeat(control.lengths[:, None], width, axis=1)
        if self.manifest.dialect != "portable":
            seen = seen + np.arange(1, width + 1)
        np.less(row, seen[:, None, :, None], out=mask)

    def _bind_loop(self, current: int, width: int, context: int, loop: int) -> Any:
        inputs: dict[str, NDArray[Any]] = {}
        outputs: dict[str, NDArray[Any]] = {}
        for state in self.manifest.states:
            if state.kind == "swap":
                inputs[state.input] = self._state(state, current, width)
                outputs[state.output] = self._state(state, 1 - current, width)
                continue
            cache = self._array(state.input, state.shape, state.dtype, width)
            cache = cache[loop] if state.kind == "per_loop" else cache
            inputs[state.input] = outputs[state.output] = cache
            if state.kind == "read_only":
                outputs[state.output] = self._array(state.output, rows_shape(state.shape), state.dtype, width)
        inputs["first_loop"], inputs["lengths"] = self._scratch["first_loop"], self._scratch["lengths"]
        inputs["active"] = self._view("active", (self.batch, width))
        if self.masked:
            inputs["attention_mask"] = self._view("attention_mask", (self.batch, 1, width, context))
        else:
            inputs["chunk_lengths"] = self._scratch["chunk_lengths"]
        outputs["exit_probability"] = self._view("exit_probability", (self.batch, width))
        return self._bind("loop_step", {name: inputs[name] for name in inputs if name in self.inputs}, outputs)

    def _bind(self, graph: str, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> Any:
        binding = self.backend.sessions[graph].io_binding()
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding

    def _remember(self, key: tuple[Any, ...], binding: Any) -> None:
        self._bindings[key] = binding
        if len(self._bindings) > _MAX_BINDINGS:
            self._bindings.popitem(last=False)

    def _run(self, graph: str, binding: Any) -> None:
        try:
            self.backend.sessions[graph].run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {graph}: {_one_line(error)}") from error

    def _view(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The front of a scratch buffer in a shape; every call gives the same memory."""
        return self._scratch[name].ravel()[: int(np.prod(shape))].reshape(shape)

    def _state(self, state: StateSpec, which: int, width: int) -> NDArray[Any]:
        """One of the two buffers of a swapped state, at a chunk width."""
        return self._array(f"{state.input}/{which}", state.shape, state.dtype, width)

    def _array(self, buffer: str, shape: tuple[int | str, ...], dtype: str, width: int) -> NDArray[Any]:
        sizes = {"batch": self.batch, "chunk": width}
        dims = [sizes[d] if isinstance(d, str) else d for d in shape]
        count = int(np.prod(dims)) * np.dtype(dtype).itemsize
        return self.buffers[buffer][:count].view(dtype).reshape(dims)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
