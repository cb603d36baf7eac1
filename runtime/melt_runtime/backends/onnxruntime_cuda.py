"""Run a package with ONNX Runtime on an NVIDIA device, by its CUDA provider or the TensorRT-RTX provider plugin.

All state is in device memory that this backend allocates and binds by address. Only control inputs, exit probability
and logits are copied between host and device. ONNX Runtime waits for the device at the end of every run, and copies are
waited for before a run starts, so no stream is shared.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError
from ..package.manifest import Manifest
from ..package.reader import Package
from ..package.specs import CODA
from ..untrusted import brief
from .bindings import Binding, state_buffers
from .buffers import BufferState
from .choose import CUDA_PROVIDER
from .device_memory import DeviceBuffers
from .devices import PLUGIN_MODULE
from .onnxruntime_cpu import OnnxRuntimeBase, rounded, run_bound
from .positions import StridedRegion

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, which numpy does not have


class DeviceBackend(OnnxRuntimeBase, ABC):
    """The graphs on a device. A subclass gives sessions their provider."""

    def __init__(self, package: Package, device: int = 0):
        super().__init__(package)
        self.device_index = device
        self.device = self.open_device()
        self.sessions = {name: self.session(name) for name in package.manifest.graphs}
        self.on_device = {name: self.reads_on_device(session) for name, session in self.sessions.items()}
        require_states_on_device(package.manifest, self.on_device)

    def reads_on_device(self, session: Any) -> dict[str, bool]:
        """Return, by input, whether the session reads it in device memory."""
        infos = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
        return {spec.name: in_device_memory(info) for spec, info in infos}

    def open_device(self) -> Any:
        """Open the device. Raises BackendError: no driver, no such device, cuda-bindings not installed."""
        from .cuda import open_device

        return open_device(self.device_index)

    @abstractmethod
    def session(self, graph: str) -> Any:
        """Make a graph's session on the device. Raises BackendError."""

    def buffers(self, sizes: dict[str, int], staged: Iterable[str]) -> DeviceBuffers:
        """Allocate zeroed device buffers with these sizes in bytes, and staging buffers for some. Raises
        BackendError."""
        return DeviceBuffers(self.device, sizes, staged)

    def open_state(self, batch: int) -> DeviceState:
        """Allocate all state of a batch. Raises ArgumentError above the package's max_batch, BackendError."""
        self.check_batch(batch)
        return DeviceState(self, batch)

    def available_bytes(self) -> int | None:
        """Return the device's free memory in bytes."""
        return int(self.device.memory()[0])

    def require_provider(self, session: Any, graph: str, provider: str, advice: str) -> None:
        """Raise BackendError if ONNX Runtime fell back to the CPU, which it does without an error."""
        if provider not in session.get_providers():
            raise BackendError(f"ONNX Runtime could not start its {provider} for {graph}.onnx; {advice}")


class CudaBackend(DeviceBackend):
    """The backend of ONNX Runtime's CUDA provider."""

    name = "onnxruntime-cuda"

    def session(self, graph: str) -> Any:
        """Make a session on CUDA without TF32, which would round float32 matmuls."""
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
        """Load the CUDA and cuDNN libraries that pip installed. Send the library's output to stderr."""
        preload = getattr(self.ort, "preload_dlls", None)
        if preload is not None:
            with redirect_stdout(sys.stderr):
                preload()


class TensorRTRTXBackend(DeviceBackend):
    """The backend of the TensorRT-RTX provider, a separately installed plugin that compiles graphs when they are
    loaded."""

    name = "onnxruntime-tensorrt-rtx"

    def session(self, graph: str) -> Any:
        """Make a session on the plugin's device."""
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
        """Return the provider's name and our device; register the plugin's library once per process."""
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
    """The state of a batch on the device, with staging buffers for everything but the states."""

    def __init__(self, backend: DeviceBackend, batch: int):
        self.backend = backend
        super().__init__(backend.package.manifest, batch)

    @property
    def computed_by(self) -> str:
        """The backend's name."""
        return self.backend.name

    def allocate(self, sizes: dict[str, int]) -> None:
        """Allocate all buffers or none. Raises BackendError with needed and free bytes."""
        states = set(state_buffers(self.manifest, self.batch))
        self.buffers = self.backend.buffers(sizes, [name for name in sizes if name not in states])

    def stage(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the buffer's staging buffer."""
        return self.buffers.host(buffer, dtype, shape)

    def send(self, buffer: str, count: int) -> None:
        """Upload staged data."""
        self.buffers.upload(buffer, count)

    def view(self, buffer: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """Download a buffer's contents."""
        return self.buffers.download(buffer, dtype, shape, offset)

    def copy(self, target: StridedRegion, source: StridedRegion, count: int, blocks: int) -> None:
        """Copy blocks on the device."""
        self.buffers.copy(target, source, count, blocks)

    def fetch(self, source: StridedRegion, count: int, blocks: int) -> NDArray[np.uint8]:
        """Download blocks of a buffer."""
        return self.buffers.fetch(source, count, blocks)

    def store(self, target: StridedRegion, values: NDArray[np.uint8]) -> None:
        """Upload blocks into a buffer."""
        self.buffers.store(target, values)

    def bind(self, graph: str, inputs: tuple[Binding, ...], outputs: tuple[Binding, ...]) -> Any:
        """Make an I/O binding by address. Inputs that a graph reads on the host, such as lengths, are bound to staging
        buffers.

        Otherwise ONNX Runtime would copy them across once, at binding, and never again.
        """
        binding = self.backend.sessions[graph].io_binding()
        kind, index = self.buffers.kind, self.backend.device_index
        for tensor in inputs:
            if self.backend.on_device[graph][tensor.tensor]:
                self._bind_tensor(binding.bind_input, tensor, kind, index, self._address(tensor))
            else:
                staging = self.buffers.host(tensor.buffer, np.dtype(np.uint8), (1,))
                self._bind_tensor(binding.bind_input, tensor, "cpu", 0, staging.ctypes.data)
        for tensor in outputs:
            self._bind_tensor(binding.bind_output, tensor, kind, index, self._address(tensor))
        return binding

    def _address(self, tensor: Binding) -> int:
        return self.buffers.address(tensor.buffer) + tensor.offset

    @staticmethod
    def _bind_tensor(bind: Any, tensor: Binding, kind: str, index: int, address: int) -> None:
        element = _BFLOAT16 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype)
        bind(tensor.tensor, kind, index, element, tensor.shape, address)

    def run(self, graph: str, bound: Any) -> None:
        """Run a graph on its bound buffers and wait for it."""
        run_bound(self.backend.sessions[graph], graph, bound)

    def bucket(self, positions: int) -> int:
        """Round up to a multiple of a fixed length, as on the CPU."""
        return rounded(positions, self.manifest.cache_rows)


def in_device_memory(info: Any) -> bool:
    """Return whether an input is read in device memory, by its entry in ``get_input_memory_infos``."""
    return str(info.name).lower() != "cpu" and "HOST" not in str(info.device_mem_type)


def require_states_on_device(manifest: Manifest, on_device: dict[str, dict[str, bool]]) -> None:
    """Refuse sessions that would run a state's reader on the CPU and so copy the whole state every loop.

    ``on_device``: by graph and input. Raises BackendError that names the state and the way out.
    """
    owners = {"prelude": "embed", "core": "loop_step", CODA: CODA}
    host = [state.input for state in manifest.states if not on_device[owners[state.stage]][state.input]]
    if host or not on_device["lm_head"]["hidden"]:
        what = host[0] if host else "hidden in the head"
        raise BackendError(
            f"ONNX Runtime has no kernel on this device for what reads {what} in the {manifest.dialect} dialect and "
            f"{manifest.precision} and would run it on the CPU; export with --precision fp16 or another --dialect, "
            "or use the backend onnxruntime"
        )
