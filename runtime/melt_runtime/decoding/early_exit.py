"""Early exit: which tokens of a chunk go on to the next loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..package.manifest import Manifest
from .settings import LoopSettings


def depth_warnings(manifest: Manifest, loops: int) -> tuple[str, ...]:
    """Return a warning for more loops than the model was trained for."""
    configured = manifest.model.get("total_ut_steps")
    trained = max(manifest.loops, configured if isinstance(configured, int) else 0)
    if loops <= trained:
        return ()
    known = "1 loop" if trained == 1 else f"{trained} loops"
    return (f"loops is {loops}, but the model was trained for {known} per token: its answers may make no sense",)


class Depth:
    """The depth of a chunk's tokens while their loops run.

    ``active`` (batch, chunk) bool: the tokens that the next loop runs for. ``spent`` (batch, chunk): loops run per
    token. Whether a token leaves depends on its sequence's settings and its own exit probability and hidden state only,
    never on the rest of the batch.
    """

    def __init__(self, settings: Sequence[LoopSettings], present: NDArray[np.bool_]):
        self.active, self.spent = present, np.zeros(present.shape, np.int64)
        self.loop = 0
        self._remaining = np.ones(present.shape, np.float32)
        self._hidden: NDArray[np.float32] | None = None  # after the preceding loop
        self._loops = np.array([[one.loops] for one in settings])
        self._least = np.array([[one.min_loops] for one in settings])
        self._threshold = np.array([[one.exit_threshold] for one in settings], np.float32)
        self._gated = np.array([[one.exit_threshold < 1.0] for one in settings])
        self._change = np.array([[one.exit_change] for one in settings], np.float32)
        self._watched = bool((self._change > 0)[present.any(axis=1)].any())
        self._kl = np.array([one.exit_kl for one in settings])
        self._same = np.array([one.exit_same for one in settings])
        self._entropy = np.array([one.exit_entropy for one in settings])
        self._margin = np.array([one.exit_margin or np.inf for one in settings])
        self._heard = np.array([one.hears_head for one in settings]) & (present.sum(axis=1) == 1)  # sequences
        self._said: NDArray[np.float64] | None = None  # log-probabilities after the preceding loop
        self._still = np.zeros(len(settings), np.int64)  # loops in which the likeliest token stayed the same

    def ran(
        self,
        exit_probability: NDArray[np.float32] | None,
        hidden: Callable[[], NDArray[np.floating]],
        logits: Callable[[], NDArray[np.float32]],
    ) -> None:
        """Update ``active`` after a loop.

        ``exit_probability``: (batch, chunk); None without an exit gate. ``hidden``: returns (batch, chunk, d); called
        only if a change of the hidden state can end a token. ``logits``: returns those of the first column (batch,
        vocab); called only if they can.
        """
        self.loop += 1
        self.spent += self.active
        undecided = self.active & (self.loop < self._loops)  # the others leave in any case
        if exit_probability is not None:
            self._remaining = self._remaining * (np.float32(1) - exit_probability)
        leaves = self._gated & (np.float32(1) - self._remaining >= self._threshold)
        if self._watched and undecided.any():
            leaves |= self._settled(hidden().astype(np.float32, copy=False))
        if (self._heard & undecided.any(axis=1)).any():
            leaves[:, 0] |= self._heard & self._agreed(logits())
        leaves &= self.loop >= self._least
        self.active = self.active & ~leaves & (self.loop < self._loops)

    def _settled(self, hidden: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return the tokens whose hidden state changed by less than ``exit_change``; none after the first loop."""
        before, self._hidden = self._hidden, hidden
        if before is None:
            return np.zeros(self.active.shape, np.bool_)
        with np.errstate(invalid="ignore", over="ignore"):  # padding may hold anything
            change, length = (np.sqrt(np.square(values).sum(axis=-1)) for values in (hidden - before, hidden))
            return np.asarray(change < self._change * length)

    def _agreed(self, logits: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return the sequences (batch,) of whose token the head is sure, or says what it said a loop before."""
        before, self._said = self._said, _log_softmax(logits)
        with np.errstate(invalid="ignore"):  # an impossible token has a probability of 0
            chances = np.exp(self._said)
            settled = self._sure(chances, -np.nansum(chances * self._said, axis=-1))
            if before is None:
                return settled
            change = np.nansum(chances * (self._said - before), axis=-1)
        self._still = np.where(self._said.argmax(axis=-1) == before.argmax(axis=-1), self._still + 1, 0)
        return np.asarray(settled | (change < self._kl) | ((self._same > 0) & (self._still >= self._same)))

    def _sure(self, chances: NDArray[np.float64], entropy: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return the sequences (batch,) whose words, of these ``chances`` (batch, vocab), are sure enough."""
        sure = entropy < self._entropy
        if chances.shape[-1] > 1 and np.isfinite(self._margin).any():
            best = np.partition(chances, -2, axis=-1)[:, -2:]
            sure |= best[:, 1] - best[:, 0] >= self._margin
        return np.asarray(sure)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", over="ignore"):  # a sequence without a token here may hold anything
        wide = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))
