"""Distances between two runs of a model, by quantity, loop and layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ParityError
from ..reference.pytorch import LoopTrace

# Quantity, loop, and layer (None: the whole stack).
Key: TypeAlias = tuple[str, int, int | None]
# Limit of a package's error against float64, in multiples of PyTorch's float32 error. Packages of random models with up
# to 24 layers or 16 loops reached 1.7 times, one of SmolLM2 with 4-bit weights 4.5 times.
MULTIPLE = 8.0


class Distances:
    """Relative errors, max |got - expected| over max |expected|, by quantity, loop and layer; and distances of logits.

    ``tie``: a token counts as best if its logit is this close to the best one.
    """

    def __init__(self, tie: float = 0.0) -> None:
        self.tie = tie
        self.difference: dict[Key, float] = {}
        self.scale: dict[Key, float] = {}
        self.kl: list[float] = []
        self.agree: list[bool] = []

    def compare_trace(self, got: LoopTrace, expected: LoopTrace) -> None:
        """Add one loop over one chunk."""
        loop = expected.loop
        self.compare("hidden", loop, got.hidden, expected.hidden)
        if got.exit_probability is not None and expected.exit_probability is not None:
            self.compare("exit probability", loop, got.exit_probability, expected.exit_probability, scale=1.0)
        self.compare("logits", loop, got.logits, expected.logits)
        by_layer = {"key rows": (got.keys, expected.keys), "value rows": (got.values, expected.values)}
        if got.latent is not None and expected.latent is not None:
            by_layer["latent"] = (got.latent, expected.latent)
        for quantity, (mine, theirs) in by_layer.items():
            for layer, pair in enumerate(zip(mine, theirs, strict=True)):
                self.compare(quantity, loop, *pair, layer=layer)
        kl, agree = agreement(log_softmax(got.logits), log_softmax(expected.logits), self.tie)
        self.kl += kl
        self.agree += agree

    def compare(
        self,
        quantity: str,
        loop: int,
        got: NDArray[Any],
        expected: NDArray[Any],
        *,
        layer: int | None = None,
        scale: float = 1e-30,
    ) -> None:
        """Add a pair of arrays. ``scale`` is the smallest divisor. NaN counts as an infinite error."""
        if got.shape != expected.shape:
            raise ParityError(
                f"{quantity} of loop {loop} has the shape {list(got.shape)} in the package and "
                f"{list(expected.shape)} in the checkpoint: the package was made from another one"
            )
        got, expected, key = got.astype(np.float64), expected.astype(np.float64), (quantity, loop, layer)
        difference = float(np.abs(got - expected).max())
        difference = difference if np.isfinite(difference) else float("inf")
        self.difference[key] = max(self.difference.get(key, 0.0), difference)
        self.scale[key] = max(self.scale.get(key, scale), float(np.abs(expected).max()))

    @property
    def relative(self) -> dict[Key, float]:
        """The relative errors."""
        return {key: difference / self.scale[key] for key, difference in self.difference.items()}


@dataclass(frozen=True)
class OwnError:
    """Distance of PyTorch's float32 from its float64: how much a model amplifies rounding errors, whatever runs it.

    - ``relative``: by quantity, loop and layer.
    - ``logit``: the largest difference of a logit.
    - ``kl``: the mean KL divergence of the logits, in nats.

    All are zero where they were not measured.
    """

    relative: dict[Key, float] = field(default_factory=dict)
    logit: float = 0.0
    kl: float = 0.0

    @classmethod
    def of(cls, draws: Iterable[Distances]) -> OwnError:
        """Combine several orders of summation by their largest errors. A loop's error also counts for later loops."""
        relative: dict[Key, float] = {}
        logit = kl = 0.0
        for found in draws:
            for key, value in found.relative.items():
                relative[key] = max(relative.get(key, 0.0), value)
            logit = max(logit, *(value for key, value in found.difference.items() if key[0] == "logits"))
            kl = max(kl, float(np.mean(found.kl)))
        for quantity, loop, layer in sorted(relative, key=lambda key: key[1]):
            before = relative.get((quantity, loop - 1, layer), 0.0)
            relative[quantity, loop, layer] = max(relative[quantity, loop, layer], before)
        return cls(relative, logit, kl)

    @property
    def tie(self) -> float:
        """How close two logits must be for rounding to swap them."""
        return 2 * MULTIPLE * self.logit

    def limit(self, key: Key, least: float) -> float:
        """Return the relative error that a package may have: at least ``least``, more if the model amplifies rounding
        errors."""
        return max(least, MULTIPLE * self.relative.get(key, 0.0))


def agreement(got: NDArray[Any], expected: NDArray[Any], tie: float = 0.0) -> tuple[list[float], list[bool]]:
    """Return KL(expected || got) in nats, and whether the best token is the same, for log-probabilities (positions,
    vocab).

    A token within ``tie`` of the best in ``expected`` counts as the same.
    """
    chosen = np.take_along_axis(expected, got.argmax(-1)[..., None], -1)[..., 0]
    return (np.exp(expected) * (expected - got)).sum(-1).tolist(), (chosen >= expected.max(-1) - tie).tolist()


def log_softmax(logits: NDArray[Any]) -> NDArray[Any]:
    """Return log-probabilities (positions, vocab) in float64."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def common_prefix(first: Iterable[int], second: Iterable[int]) -> int:
    """Return how many tokens agree from the beginning."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
