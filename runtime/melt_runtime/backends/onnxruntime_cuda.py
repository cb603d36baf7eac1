"""Runs a package with ONNX Runtime on an NVIDIA device: its CUDA provider, or the TensorRT-RTX provider as a plugin.

All state lies in device memory that this backend allocates, bound by address: the caches as input and output of one
buffer, hidden and latent in turn. What crosses is what steers a loop, the exit probability and the logits. ONNX
Runtime waits for the device at the end of every run, and the copies here are waited for before it starts, so neither
needs the other's stream.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError
from ..package.manifest import Manifest
from ..package.reader import Package
from ..package.specs import GRAPHS
from ..untrusted import brief
from .bindings import Binding, state_buffers
from .buffers import BufferState, Strip
from .choose import CUDA_PROVIDER
from .device_memory import DeviceBuffers
from .devices import PLUGIN_MODULE
from .onnxruntime_cpu import Sessions, rounded, run_bound

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, which numpy does not have


class Buffers(Protocol):
    """Named buffers on a device, and a twin on the host of those that the host writes or reads often."""

    kind: str  # ONNX Runtime's name of where they are: "cuda"
    index: int

    def address(self, buffer: str) -> int:
        """Where a buffer lies on the device."""

    def host(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The front of a buffer's twin on the host, always at the same address."""

    def upload(self, buffer: str, count: int) -> None:
        """Copies the front of a twin to the device and waits for it."""

    def download(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """A buffer from ``offset`` bytes on, copied to the host."""

    def copy(self, target: Strip, source: Strip, count: int, pieces: int) -> None:
        """Copies pieces from one buffer to another on the device and waits for it."""

    def fetch(self, source: Strip, count: int, pieces: int) -> NDArray[np.uint8]:
        """Pieces of a buffer (pieces, count), copied to the host."""

    def store(self, target: Strip, values: NDArray[np.uint8]) -> None:
        """Copies pieces (pieces, count) of the host into a buffer and waits for it."""


class DeviceBackend(Sessions, ABC):
    """The graphs on a device. A subclass says how a session gets its provider."""

    def __init__(self, package: Package, device: int = 0):
        super().__init__(package)
        self.device_index = device
        self.device = self.open_device()
        self.sessions = {name: self.session(name) for name in GRAPHS}
        self.on_device = {name: self.reads_on_device(session) for name, session in self.sessions.items()}
        require_states_on_device(package.manifest, self.on_device)

    def reads_on_device(self, session: Any) -> dict[str, bool]:
        """Whether a session reads each of its inputs in the device's memory."""
        infos = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
        return {spec.name: in_device_memory(info) for spec, info in infos}

    def open_device(self) -> Any:
        """The device's memory. Raises BackendError: no driver, no such device, cuda-bindings not installed."""
        from .cuda import open_device

        return open_device(self.device_index)

    @abstractmethod
    def session(self, graph: str) -> Any:
        """A graph's session on the device. Raises BackendError."""

    def buffers(self, sizes: dict[str, int], twins: Iterable[str]) -> Buffers:
        """Zeroed buffers on the device, of so many bytes each. Raises BackendError."""
        return DeviceBuffers(self.device, sizes, twins)

    def open_state(self, batch: int) -> DeviceState:
        """Allocates all state of a batch. Raises ArgumentError above the package's max_batch, BackendError."""
        self.check_batch(batch)
        return DeviceState(self, batch)

    def available_bytes(self) -> int | None:
        """Free memory of the device."""
        return int(self.device.memory()[0])

    def require_provider(self, session: Any, graph: str, provider: str, advice: str) -> None:
        """Raises BackendError where ONNX Runtime fell back to the CPU, which it does without an error."""
        if provider not in session.get_providers():
            raise BackendError(f"ONNX Runtime could not start its {provider} for {graph}.onnx; {advice}")


class CudaBackend(DeviceBackend):
    """ONNX Runtime's CUDA provider."""

    name = "onnxruntime-cuda"

    def session(self, graph: str) -> Any:
        """A session on CUDA, with float32 products as float32: TF32 would round them."""
        self._preload()
        options = {
            "device_id": str(self.device_index),
            "use_tf32": "0",
            "arena_extend_strategy": "kSameAsRequested",
        }
        session = self.load(graph, self.options(), [(CUDA_PROVIDER, options), "CPUExecutionProvider"])
        advice = "its CUDA libraries cannot be loaded: pip install 'onnxruntime-gpu[cuda,cudnn]' brings them"
        self.require_provider(session, graph, CUDA_PROVIDER, advice)
        return session

    def _preload(self) -> None:
        """CUDA's and cuDNN's libraries from where pip put them. What it says goes where messages go."""
        preload = getattr(self.ort, "preload_dlls", None)
        if preload is not None:
            with redirect_stdout(sys.stderr):
                preload()


class TensorRTRTXBackend(DeviceBackend):
    """The TensorRT-RTX provider, a plugin in a package of its own; it compiles the graphs when they are loaded."""

    name = "onnxruntime-tensorrt-rtx"

    def session(self, graph: str) -> Any:
        """A session on the plugin's device."""
        provider, devices = self._plugin()
        options = self.options()
        try:
            options.add_provider_for_devices(devices, {})
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot use its TensorRT-RTX provider: {brief(error)}") from error
        session = self.load(graph, options, None)
        self.require_provider(session, graph, provider, "the provider gave no reason")
        return session

    def _plugin(self) -> tuple[str, list[Any]]:
        """The provider's name and its device of our index; registers the plugin's library once a process."""
        try:
            plugin = import_module(PLUGIN_MODULE)
        except (ImportError, OSError) as error:
            raise BackendError(f"ONNX Runtime's TensorRT-RTX provider cannot be loaded: {brief(error)}") from error
        name = str(plugin.get_ep_name())
        if not self._devices(name):
            try:
                self.ort.register_execution_provider_library(name, plugin.get_library_path())
            except Exception as error:
                raise BackendError(f"ONNX Runtime refuses its TensorRT-RTX provider: {brief(error)}") from error
        memory = self.ort.OrtDeviceMemoryType.DEFAULT
        devices = [d for d in self._devices(name) if d.memory_info(memory).device_id == self.device_index]
        if not devices:
            count = len(self._devices(name))
            raise BackendError(f"the TensorRT-RTX provider finds no device {self.device_index} here; it finds {count}")
        return name, devices[:1]

    def _devices(self, name: str) -> list[Any]:
        return [device for device in self.ort.get_ep_devices() if device.ep_name == name]


class DeviceState(BufferState):
    """The buffers of one batch on the device, and twins on the host of all but the states."""

    def __init__(self, backend: DeviceBackend, batch: int):
        self.backend = backend
        super().__init__(backend.package.manifest, batch)

    @property
    def computed_by(self) -> str:
        """The backend's name."""
        return self.backend.name

    def allocate(self, sizes: dict[str, int]) -> None:
        """All of it or none. Raises BackendError with what is needed and what is free."""
        states = set(state_buffers(self.manifest, self.batch))
        self.buffers = self.backend.buffers(sizes, [name for name in sizes if name not in states])

    def stage(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The buffer's twin on the host."""
        return self.buffers.host(buffer, dtype, shape)

    def send(self, buffer: str, count: int) -> None:
        """Uploads what was staged."""
        self.buffers.upload(buffer, count)

    def view(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Downloads a buffer's front, or of a part's caches its own."""
        return self.buffers.download(buffer, dtype, shape, self.offsets.get(buffer, 0))

    def copy(self, target: Strip, source: Strip, count: int, pieces: int) -> None:
        """A strided copy on the device."""
        self.buffers.copy(target, source, count, pieces)

    def fetch(self, source: Strip, count: int, pieces: int) -> NDArray[np.uint8]:
        """Downloads pieces of a buffer."""
        return self.buffers.fetch(source, count, pieces)

    def store(self, target: Strip, values: NDArray[np.uint8]) -> None:
        """Uploads pieces into a buffer."""
        self.buffers.store(target, values)

    def bind(self, graph: str, inputs: tuple[Binding, ...], outputs: tuple[Binding, ...]) -> Any:
        """An I/O binding by address. What a graph reads on the host, such as a length, is bound to its twin there.

        ONNX Runtime would copy an input from the other side once, when it is bound, and never again.
        """
        binding = self.backend.sessions[graph].io_binding()
        for tensor in inputs:
            if self.backend.on_device[graph][tensor.tensor]:
                self._bind_tensor(
                    binding.bind_input, tensor, self.buffers.kind, self.buffers.index, self._address(tensor)
                )
            else:
                twin = self.buffers.host(tensor.buffer, np.dtype(np.uint8), (1,))
                self._bind_tensor(binding.bind_input, tensor, "cpu", 0, twin.ctypes.data)
        for tensor in outputs:
            self._bind_tensor(binding.bind_output, tensor, self.buffers.kind, self.buffers.index, self._address(tensor))
        return binding

    def _address(self, tensor: Binding) -> int:
        return self.buffers.address(tensor.buffer) + tensor.offset

    @staticmethod
    def _bind_tensor(bind: Any, tensor: Binding, kind: str, index: int, address: int) -> None:
        element = _BFLOAT16 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype)
        bind(tensor.tensor, kind, index, element, tensor.shape, address)

    def run(self, graph: str, bound: Any) -> None:
        """Runs a graph on its bound buffers and waits for it."""
        run_bound(self.backend.sessions[graph], graph, bound)

    def bucket(self, rows: int) -> int:
        """The next multiple of a fixed length, as on the CPU."""
        return rounded(rows, self.manifest.cache_rows)


def in_device_memory(info: Any) -> bool:
    """Whether a session reads an input in its device's memory, by what ``get_input_memory_infos`` says of it."""
    return str(info.name).lower() != "cpu" and "HOST" not in str(info.device_mem_type)


def require_states_on_device(manifest: Manifest, on_device: dict[str, dict[str, bool]]) -> None:
    """Refuses sessions that would run what reads a state on the CPU: they would copy all of it every loop.

    on_device: by graph and input. Raises BackendError that names the state and the way out.
    """
    host = [state.input for state in manifest.states if not on_device["loop_step"][state.input]]
    if host or not on_device["lm_head"]["hidden"]:
        what = host[0] if host else "hidden in the head"
        raise BackendError(
            f"ONNX Runtime has no kernel on this device for what reads {what} in the {manifest.dialect} dialect and "
            f"{manifest.precision} and would run it on the CPU; export with --precision fp16 or another --dialect, "
            "or use the backend onnxruntime"
        )
