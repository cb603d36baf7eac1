"""How deep each sequence of a batch thinks: its settings, and which of its tokens are still in the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError
from .package import MAX_LOOPS, Manifest


@dataclass(frozen=True)
class LoopSettings:
    """How deep to think: at most ``loops`` loops a token, fewer where it leaves early, and at least ``min_loops``.

    A token leaves once its cumulative exit probability reaches ``exit_threshold`` (1.0: never), or once its hidden
    state changes by less than the share ``exit_change`` of its length from one loop to the next, ||h_t - h_{t-1}|| <
    exit_change * ||h_t|| (0.0: never). The latter needs no trained exit gate, and costs that hidden is read back after
    every loop. ``chunk`` is how many prompt tokens run their loops together (None: the package's): part of the model's
    meaning, so change it only on purpose. Raises ArgumentError.
    """

    loops: int
    exit_threshold: float = 1.0
    chunk: int | None = None
    min_loops: int = 1
    exit_change: float = 0.0

    def __post_init__(self) -> None:
        whole_number("loops", self.loops)
        whole_number("min_loops", self.min_loops)
        if self.loops > MAX_LOOPS:
            raise ArgumentError(f"loops is above {MAX_LOOPS:,}, the most that a token may have")
        if self.chunk is not None:
            whole_number("chunk", self.chunk)
        if self.min_loops > self.loops:
            raise ArgumentError(f"min_loops is {self.min_loops}, above the {self.loops} loops that a token may have")
        if not _real(self.exit_threshold) or not 0.0 <= self.exit_threshold <= 1.0:
            raise ArgumentError(f"exit_threshold is {self.exit_threshold!r}; it must lie between 0 and 1")
        if not _real(self.exit_change) or not 0.0 <= self.exit_change < math.inf:
            raise ArgumentError(f"exit_change is {self.exit_change!r}; it must be a finite number of at least 0")

    @property
    def adaptive(self) -> bool:
        """Whether a token may leave before its last loop."""
        return self.min_loops < self.loops and (self.exit_threshold < 1.0 or self.exit_change > 0.0)

    def check(self, manifest: Manifest) -> None:
        """Raises ArgumentError for a depth or chunk that the package does not allow."""
        manifest.check_depth(self.loops, self.exit_threshold)
        if manifest.cache_loops is not None and self.exit_change > 0.0:
            raise ArgumentError(
                f"exit_change is {self.exit_change}; a token of a LoopLM that left early would lack its rows in the "
                "later loops' caches, so only 0 is possible"
            )
        if self.chunk is not None and self.chunk > manifest.chunk:
            raise ArgumentError(f"chunk is {self.chunk}; this package was exported for at most {manifest.chunk}")


def _real(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def whole_number(name: str, value: object) -> None:
    """Raises ArgumentError unless ``value`` is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} is {value!r}; it must be a whole number from 1")


def depth_warnings(manifest: Manifest, loops: int) -> tuple[str, ...]:
    """What to say of more loops than the model was trained for; nothing of others."""
    configured = manifest.model.get("total_ut_steps")
    trained = max(manifest.loops, configured if isinstance(configured, int) else 0)
    if loops <= trained:
        return ()
    known = "1 loop" if trained == 1 else f"{trained} loops"
    return (f"loops is {loops}, but the model was trained for {known} per token: its answers may make no sense",)


class Depth:
    """A chunk's tokens on their way through the loops, each by its sequence's settings.

    ``active`` (batch, chunk) bool: the tokens that the next loop runs for; ``spent``, the same: loops each has had.
    A token's fate depends on its own exit probability and hidden state alone, never on what else is in the batch.
    """

    def __init__(self, settings: Sequence[LoopSettings], present: NDArray[np.bool_]):
        self.active, self.spent = present, np.zeros(present.shape, np.int64)
        self.loop = 0
        self._remaining = np.ones(present.shape, np.float32)
        self._hidden: NDArray[np.float32] | None = None  # after the loop before
        self._loops = np.array([[one.loops] for one in settings])
        self._least = np.array([[one.min_loops] for one in settings])
        self._threshold = np.array([[one.exit_threshold] for one in settings], np.float32)
        self._gated = np.array([[one.exit_threshold < 1.0] for one in settings])
        self._change = np.array([[one.exit_change] for one in settings], np.float32)
        self._watched = bool((self._change > 0)[present.any(axis=1)].any())

    def ran(self, exit_probability: NDArray[np.float32], hidden: Callable[[], NDArray[np.floating]]) -> None:
        """A loop is over: who leaves? exit_probability (batch, chunk); hidden() gives (batch, chunk, d), and is called
        only where a change of it may let a token leave."""
        self.loop += 1
        self.spent += self.active
        self._remaining = self._remaining * (np.float32(1) - exit_probability)
        leaves = self._gated & ((np.float32(1) - self._remaining) >= self._threshold)
        if self._watched:
            leaves |= self._settled(hidden().astype(np.float32, copy=False))
        leaves &= self.loop >= self._least
        self.active = self.active & ~leaves & (self.loop < self._loops)

    def _settled(self, hidden: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Whose hidden state changed by less than its share; nobody's before there are two to compare."""
        before, self._hidden = self._hidden, hidden
        if before is None:
            return np.zeros(self.active.shape, np.bool_)
        with np.errstate(invalid="ignore", over="ignore"):  # padding may hold anything
            change, length = (np.sqrt(np.square(values).sum(axis=-1)) for values in (hidden - before, hidden))
            return np.asarray(change < self._change * length)
