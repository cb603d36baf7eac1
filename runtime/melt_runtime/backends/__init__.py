"""What runs a package: a backend owns buffers and execution, and nothing of the model's logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..candidates import Candidates
from ..errors import ArgumentError, BackendError, PackageError
from ..package import Package
from .choice import Choice, explain, ranked
from .survey import survey

if TYPE_CHECKING:
    from .tensorrt import TensorRTBackend

__all__ = ["Backend", "BackendState", "LoopControl", "Opened", "open_backend", "survey"]


@dataclass(frozen=True)
class LoopControl:
    """What steers one loop step over a chunk.

    first_loop (batch,) bool; active (batch, chunk) bool; lengths (batch,) int64, tokens in the cache before this
    chunk; chunk_lengths (batch,) int64, how many of the chunk's columns are tokens (the rest is right padding).
    """

    first_loop: NDArray[np.bool_]
    active: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    chunk_lengths: NDArray[np.int64]


class BackendState(Protocol):
    """All state buffers of a batch, allocated once, and the graphs bound to them.

    ``likeliest``: how many of the likeliest tokens ``candidates`` picks out; 0: it gives None.
    """

    batch: int
    state_bytes: int
    likeliest: int

    @property
    def computed_by(self) -> str:
        """What computes the rows, by a name of its own: the backend, and of TensorRT the engine."""

    def embed(self, token_ids: NDArray[np.int64]) -> None:
        """token_ids (batch, chunk) -> the hidden buffer."""

    def loop(self, control: LoopControl) -> NDArray[np.float32]:
        """One loop step; swaps hidden and latent. Returns the exit probability (batch, chunk), valid until the next."""

    def run_chunk(
        self,
        token_ids: NDArray[np.int64],
        control: LoopControl,
        loops: int,
        head: bool,
        between: Callable[[], None] | None = None,
    ) -> None:
        """``embed``, ``loops`` loop steps and ``commit``, nothing decided between; ``control`` is the first one's.

        ``head``: whether logits are wanted next, so that the whole token may be one launch; only a hint. ``between``:
        called between two loops that are launched one by one; what it raises ends the chunk, of which no row counts.
        """

    def commit(self, control: LoopControl) -> None:
        """After a chunk's last loop: writes its rows, where the graph did not do that itself."""

    def logits(self, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of columns (batch, n) of the chunk -> (batch, n, vocab), valid until the next call."""

    def candidates(self, columns: NDArray[np.int64]) -> list[Candidates] | None:
        """The likeliest tokens after columns (batch, 1), a sequence each; None where only whole rows are to be had."""

    def part(self, first: int, count: int) -> BackendState | None:
        """Sequences ``first`` to ``first + count - 1`` as a state over the same memory, in turns with the whole; None
        where the backend cannot."""

    def exit_probability(self) -> NDArray[np.float32]:
        """A copy of what the last loop step returned, (batch, chunk)."""

    def read(self, name: str, index: Any = ...) -> NDArray[Any]:
        """A copy of a state as it stands, by its name in the manifest; ``index`` picks a part of it."""

    def rows(self, slot: int, start: int, stop: int, loops: int | None = None) -> dict[str, NDArray[Any]]:
        """A copy of the cache rows ``start`` to ``stop - 1`` of a sequence, by buffer (kv_heads, rows, head_dim)."""

    def write_rows(self, slot: int, start: int, rows: Mapping[str, NDArray[Any]]) -> None:
        """Writes what ``rows`` gave into the cache rows of a sequence from ``start`` on."""


class Backend(Protocol):
    """A loaded package, ready to open states of up to ``max_batch`` sequences."""

    name: str

    @property
    def max_batch(self) -> int:
        """The most sequences of a batch."""

    def available_bytes(self) -> int | None:
        """Memory that a state may take where it lies; None where nobody tells."""

    def open_state(self, batch: int) -> BackendState:
        """Allocates all state of a batch. Raises BackendError when there is no memory for it."""


@dataclass(frozen=True)
class Opened:
    """A backend that was loaded, and in a sentence why it was that one."""

    backend: Backend
    reason: str


def open_backend(
    package: Package,
    name: str = "auto",
    threads: int | None = None,
    low_memory: bool = False,
    engine: str | None = None,
    device: int = 0,
    check_hashes: bool = True,
) -> Opened:
    """Loads a package into a backend by name, or for "auto" into the best one that can run it here.

    threads, low_memory: of the CPU. engine: for TensorRT, by its name in the package (None: the first that fits).
    device: index of the NVIDIA device, where one is used. With "auto" a backend that fails to load is passed over, and
    the reason says why. Raises ArgumentError, BackendError, PackageError.
    """
    if name == "auto" and (low_memory or engine is not None):
        name = "onnxruntime" if low_memory else "tensorrt"
    if low_memory and name != "onnxruntime":
        raise ArgumentError(f"low_memory is of the CPU (backend onnxruntime); {name} keeps the weights on its device")
    if engine is not None and name != "tensorrt":
        raise ArgumentError(f"engine {engine!r} was named for the backend {name}; only tensorrt runs engines")
    if name == "tensorrt":
        # It has the most to say about why not, and what to build again.
        backend = _tensorrt(package, engine, device, check_hashes)
        return Opened(backend, f"asked for by name; engine {backend.engine}")
    facts = survey(package)
    failed: dict[str, str] = {}
    for choice in ranked(facts, name, device):
        try:
            opened = _load(package, choice, device, threads, low_memory, check_hashes)
        except (BackendError, PackageError) as error:
            if name != "auto":
                raise
            failed[choice.name] = str(error)
            continue
        return Opened(opened, explain(facts, choice, name, device, failed))
    tried = "; ".join(f"not {backend}: {reason}" for backend, reason in failed.items())
    raise BackendError(f"nothing here can run this package; {tried}")


def _load(
    package: Package, choice: Choice, device: int, threads: int | None, low_memory: bool, check_hashes: bool
) -> Backend:
    """Imports a backend's module, and with it its library, only when it is the one."""
    if choice.name == "tensorrt":
        return _tensorrt(package, choice.engine, device, check_hashes)
    if choice.name == "onnxruntime":
        from .onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(package, threads, low_memory)
    from .onnxruntime_cuda import CudaBackend, TensorRTRTXBackend

    return (CudaBackend if choice.name == "onnxruntime-cuda" else TensorRTRTXBackend)(package, device)


def _tensorrt(package: Package, engine: str | None, device: int, check_hashes: bool) -> TensorRTBackend:
    from .tensorrt import TensorRTBackend

    return TensorRTBackend(package, engine, device, check_hashes=check_hashes)
