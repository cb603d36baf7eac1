"""A stand-in for a CUDA device and for TensorRT's runtime, in host memory. It proves nothing about CUDA or TensorRT.

It tests the logic around them. Its stream is lazy: work waits until someone synchronizes, so that code that reads too
early, or overwrites what is still to be read, gets wrong values. A graph is a list of work with the addresses of its
capture. A plan is the name of an ONNX file, which ONNX Runtime's CPU provider runs at the given addresses.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from melt_runtime.backends import tensorrt
from melt_runtime.backends.cuda import host_array
from melt_runtime.engines import library
from melt_runtime.engines.library import Library
from melt_runtime.engines.profiles import length_buckets, make_profiles
from melt_runtime.engines.store import keep_engine, new_engine
from melt_runtime.errors import BackendError
from melt_runtime.package.engine_spec import EngineSpec
from melt_runtime.package.files import FileSpec, file_hash
from melt_runtime.package.manifest_facts import lane_shape
from melt_runtime.package.reader import Package, source_hash

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
ELEMENTS = {
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(int64)": "INT64",
    "tensor(bool)": "BOOL",
}
CANDIDATES = 16


class HostMemory:
    """Host memory that stands for device or pinned memory, counted by the device."""

    def __init__(self, device: HostDevice, count: int, kind: str):
        self.device, self.bytes, self.kind = device, count, kind
        self.raw = np.full(count + 256, 0xCD, np.uint8)
        self.address = self.raw.ctypes.data + -self.raw.ctypes.data % 256
        device.live.append((kind, count))

    def array(self) -> np.ndarray:
        """Return the bytes."""
        return host_array(self.address, self.bytes, self)

    def free(self) -> None:
        if self.address:
            self.device.live.remove((self.kind, self.bytes))
            self.address = 0

    def __del__(self) -> None:
        self.free()


class HostStream:
    """A stream whose work waits for ``synchronize``, or is recorded into a graph."""

    def __init__(self) -> None:
        self.handle = id(self)
        self.waiting: list[Callable[[], None]] = []
        self.recorded: list[Callable[[], None]] | None = None
        self.launches = self.copies = 0
        STREAMS[self.handle] = self

    def put(self, work: Callable[[], None]) -> None:
        (self.waiting if self.recorded is None else self.recorded).append(work)

    def copy(self, target: int, source: int, count: int) -> None:
        self.copies += self.recorded is None
        self.put(lambda: ctypes.memmove(target, source, count) and None)

    def copy_blocks(self, target: int, to: int, source: int, of: int, count: int, blocks: int) -> None:
        def work() -> None:
            for block in range(blocks):
                ctypes.memmove(target + block * to, source + block * of, count)

        assert self.recorded is None
        self.put(work)

    def fill(self, target: int, value: int, count: int) -> None:
        self.put(lambda: ctypes.memset(target, value, count) and None)

    def synchronize(self) -> None:
        assert self.recorded is None, "a stream that is captured cannot be waited for"
        waiting, self.waiting = self.waiting, []
        for work in waiting:
            work()

    def capture(self, work: Callable[[], None]) -> Any:
        self.recorded = []
        try:
            work()
            recorded = self.recorded
        finally:
            self.recorded = None

        def launch() -> None:
            self.launches += 1
            self.waiting += recorded

        return SimpleNamespace(launch=launch)


STREAMS: dict[int, HostStream] = {}


class HostDevice:
    """A device with ``total`` bytes. ``fails``: the kind of allocation that always fails."""

    name, capability, driver = "host memory", "8.9", "13.0"

    def __init__(self, total: int = 1 << 40, fails: str | None = None):
        self.total, self.fails = total, fails
        self.live: list[tuple[str, int]] = []
        self.made = 0

    def use(self) -> None:
        """Do nothing: there is only one device."""

    def memory(self) -> tuple[int, int]:
        return self.total - sum(count for kind, count in self.live if kind == "device"), self.total

    def _allocate(self, count: int, kind: str) -> HostMemory:
        if self.fails == kind:
            raise BackendError("cudaMalloc failed with cudaErrorMemoryAllocation: out of memory")
        self.made += 1
        return HostMemory(self, count, kind)

    def allocate(self, count: int) -> HostMemory:
        return self._allocate(count, "device")

    def pinned(self, count: int) -> HostMemory:
        return self._allocate(count, "pinned")

    def stream(self) -> HostStream:
        return HostStream()


@cache
def session_of(path: str) -> onnxruntime.InferenceSession:
    """Load a graph once."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class HostContext:
    """An execution context. It takes shapes and addresses at the time when work is put on the stream."""

    def __init__(self, engine: HostEngine):
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.profile = -1

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_device_memory(self, address: int, count: int) -> None:
        assert address % 256 == 0
        assert count >= self.engine.device_memory_size_v2
        self.scratch = (address, count)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.capturable

    def execute_async_v3(self, stream: int) -> bool:
        missing = self.engine.names - self.addresses.keys()
        if missing or self.scratch is None or self.profile < 0 or self.engine.fails:
            self.engine.logger.log("ERROR", f"no address for {missing}" if missing else "enqueue failed")
            return False
        shapes, addresses, (scratch, count) = dict(self.shapes), dict(self.addresses), self.scratch

        def work() -> None:
            ctypes.memset(scratch, 0xAB, count)  # scratch memory has no defined content between runs
            self.engine.run(shapes, addresses)

        STREAMS[stream].put(work)
        return True


class HostEngine:
    """An engine that is an ONNX file. The head's also returns the top candidates."""

    capturable, fails = True, False
    streamable_weights_size = 0

    def __init__(self, content: dict[str, Any], logger: Any):
        self.logger, self.candidates = logger, content["candidates"]
        self.device_memory_size_v2 = content["scratch"]
        self.session = session_of(content["path"])
        names = [t.name for t in (*self.session.get_inputs(), *self.session.get_outputs())]
        self.io = names + (["top_logits", "top_ids", "log_sum"] if self.candidates else [])
        self.names, self.num_io_tensors = set(self.io), len(self.io)

    def get_tensor_name(self, index: int) -> str:
        return self.io[index]

    def _tensor(self, name: str) -> Any:
        tensors = (*self.session.get_inputs(), *self.session.get_outputs())
        return next((tensor for tensor in tensors if tensor.name == name), None)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        tensor = self._tensor(name)
        if tensor is None:
            return (-1, -1, 1 if name == "log_sum" else self.candidates)
        return tuple(dim if isinstance(dim, int) else -1 for dim in tensor.shape)

    def get_tensor_dtype(self, name: str) -> str:
        tensor = self._tensor(name)
        if tensor is None:
            return "DataType.INT32" if name == "top_ids" else "DataType.FLOAT"
        return f"DataType.{ELEMENTS[tensor.type]}"

    def get_tensor_mode(self, name: str) -> str:
        inputs = {tensor.name for tensor in self.session.get_inputs()}
        return "TensorIOMode.INPUT" if name in inputs else "TensorIOMode.OUTPUT"

    def create_execution_context(self, strategy: Any) -> HostContext:
        assert strategy == "user managed"
        return HostContext(self)

    def run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        """Run the graph on tensors at the given addresses."""
        binding = self.session.io_binding()
        for tensor in self.session.get_inputs():
            binding.bind_input(tensor.name, "cpu", 0, TYPES[tensor.type], shapes[tensor.name], addresses[tensor.name])
        sizes = {}
        for tensor in self.session.get_inputs():
            for dim, size in zip(tensor.shape, shapes[tensor.name], strict=True):
                sizes[dim] = size
        for tensor in self.session.get_outputs():
            shape = [sizes.get(dim, dim) for dim in tensor.shape]
            binding.bind_output(tensor.name, "cpu", 0, TYPES[tensor.type], shape, addresses[tensor.name])
        self.session.run_with_iobinding(binding)
        if self.candidates:
            self._pick(sizes, addresses)

    def _pick(self, sizes: dict[str, int], addresses: dict[str, int]) -> None:
        vocab = int(self.session.get_outputs()[0].shape[-1])
        batch = next(iter(sizes.values()))
        logits = host_array(addresses["logits"], 4 * batch * vocab).view(np.float32).reshape(batch, vocab)
        ids = np.argsort(-logits, axis=1)[:, : self.candidates].astype(np.int32)
        values = {
            "top_ids": ids,
            "top_logits": np.take_along_axis(logits, ids, axis=1),
            "log_sum": np.log(np.exp(logits).sum(axis=1)),
        }
        for name, value in values.items():
            host_array(addresses[name], value.nbytes)[...] = np.ascontiguousarray(value).view(np.uint8).ravel()


class HostRuntime:
    """The library's runtime, which reads plans."""

    def __init__(self, logger: Any):
        self.logger = logger

    def deserialize_cuda_engine(self, content: bytes) -> HostEngine | None:
        try:
            return HostEngine(json.loads(content), self.logger)
        except ValueError:
            self.logger.log("ERROR", "the plan cannot be read")
            return None


class HostTensorRT:
    """The parts of the library's module that the backend uses."""

    __version__ = "1.7.1"
    Runtime = HostRuntime
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = "INTERNAL_ERROR", "ERROR", "WARNING"

        def __init__(self) -> None:
            """Do nothing."""


def stand_in(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """Return a device that every TensorRT backend of the test opens, with the stand-in for the library."""
    made = HostDevice()
    monkeypatch.setattr(tensorrt, "open_device", lambda index: made)
    for module in (tensorrt, library):
        monkeypatch.setattr(module, "open_library", host_library)
    return made


def host_library(flavour: str) -> Library:
    """Return the stand-in for an installed TensorRT-RTX. TensorRT is not installed."""
    if flavour != "tensorrt-rtx":
        raise BackendError("TensorRT is not installed (stand-in)")
    return Library(flavour, HostTensorRT)


def add_plans(directory: Path, name: str = "double", candidates: int = CANDIDATES, **changes: Any) -> EngineSpec:
    """Store an engine in a package."""
    package = Package.open(directory, check_hashes=False)
    manifest, buckets = package.manifest, length_buckets(package.manifest.cache_rows)
    with new_engine(directory, name) as build:
        files = {}
        for graph in manifest.graphs:
            plan = build / f"{graph}.plan"
            few = candidates if graph == "lm_head" else 0
            content = {"path": str(package.path(graph)), "candidates": few, "scratch": 4096}
            plan.write_text(json.dumps(content))
            files[graph] = FileSpec(file_hash(plan), plan.stat().st_size)
        spec = EngineSpec(
            flavour="tensorrt-rtx",
            version=HostTensorRT.__version__,
            compute_capabilities=(),
            precision=manifest.precision,
            weights=None,
            dialect=manifest.dialect,
            profiles=make_profiles(manifest.max_batch, manifest.chunk, 4, buckets, lane_shape(manifest)),
            buckets=buckets,
            options={},
            source=source_hash(manifest),
            files=files,
        )
        spec = replace(spec, **changes)
        keep_engine(directory, name, build, spec)
    return spec
