"""What runs a package: a backend owns buffers and execution, and nothing of the model's logic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..candidates import Candidates
from ..errors import ArgumentError
from ..package import Package


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
    """All state buffers of a batch, allocated once, and the graphs bound to them."""

    batch: int
    state_bytes: int

    def embed(self, token_ids: NDArray[np.int64]) -> None:
        """token_ids (batch, chunk) -> the hidden buffer."""

    def loop(self, control: LoopControl) -> NDArray[np.float32]:
        """One loop step; swaps hidden and latent. Returns the exit probability (batch, chunk), valid until the next."""

    def run_chunk(self, token_ids: NDArray[np.int64], control: LoopControl, loops: int, head: bool) -> None:
        """``embed``, ``loops`` loop steps and ``commit``, nothing decided between; ``control`` is the first one's.

        ``head``: whether logits are wanted next, so that the whole token may be one launch; only a hint.
        """

    def commit(self, control: LoopControl) -> None:
        """After a chunk's last loop: writes its rows, where the graph did not do that itself."""

    def logits(self, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of columns (batch, n) of the chunk -> (batch, n, vocab), valid until the next call."""

    def candidates(self, columns: NDArray[np.int64]) -> list[Candidates] | None:
        """The likeliest tokens after columns (batch, 1), a sequence each; None where only whole rows are to be had."""

    def exit_probability(self) -> NDArray[np.float32]:
        """A copy of what the last loop step returned, (batch, chunk)."""

    def read(self, name: str, index: Any = ...) -> NDArray[Any]:
        """A copy of a state as it stands, by its name in the manifest; ``index`` picks a part of it."""


class Backend(Protocol):
    """A loaded package, ready to open states."""

    name: str

    def open_state(self, batch: int) -> BackendState:
        """Allocates all state of a batch. Raises BackendError when there is no memory for it."""


def open_backend(
    package: Package,
    name: str = "auto",
    threads: int | None = None,
    low_memory: bool = False,
    engine: str | None = None,
    device: int = 0,
    check_hashes: bool = True,
) -> Backend:
    """Loads a package into a backend: "onnxruntime", "tensorrt", or "auto". Raises ArgumentError, BackendError.

    ``engine`` and ``device`` are for TensorRT: an engine by name (None: the first that runs here), a device by index.
    """
    if name == "tensorrt":
        from .tensorrt import TensorRTBackend

        return TensorRTBackend(package, engine, device, check_hashes=check_hashes)
    if name not in ("auto", "onnxruntime"):
        raise ArgumentError(f"backend {name!r} is not one of auto, onnxruntime, tensorrt")
    from .onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(package, threads, low_memory)
