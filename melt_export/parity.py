"""What is compared between a checkpoint and its package, how closely they must agree, and what came out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from melt_runtime.files import new_file
from melt_runtime.package import PARITY, Manifest
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tolerance:
    """Limits. ``relative``: max |a - b| over max |b|, for every state at every loop (max |a - b| alone for an exit
    probability, whose scale is 1); ``kl``: mean KL divergence of the
    logits in nats; ``top1``: least share of positions with the same best token; ``same_tokens``: whether greedy
    generation and exit depths must be identical."""

    relative: float
    kl: float
    top1: float
    same_tokens: bool


TOLERANCES = {
    "fp32": Tolerance(relative=1e-4, kl=1e-6, top1=1.0, same_tokens=True),
    "fp16": Tolerance(relative=3e-2, kl=1e-3, top1=0.98, same_tokens=False),
    "bf16": Tolerance(relative=2e-1, kl=2e-2, top1=0.9, same_tokens=False),
}
# Two computations that agree to the last bits but one round a value between two of a cache's numbers to different ones.
_CACHE_TOLERANCES = {
    "int8": Tolerance(relative=3e-2, kl=1e-3, top1=0.98, same_tokens=False),
    "int4": Tolerance(relative=3e-1, kl=2e-2, top1=0.9, same_tokens=False),
}


def tolerance_of(manifest: Manifest) -> Tolerance:
    """How closely a package must agree: by its cache where that is quantized, else by its precision."""
    return _CACHE_TOLERANCES[manifest.cache["kind"]] if manifest.cache else TOLERANCES[manifest.precision]


@dataclass
class StateError:
    """The relative error of one quantity in one loop, over all layers, chunks and sequences."""

    quantity: str
    loop: int
    relative: float


@dataclass
class GenerationResult:
    """One greedy run: ``same`` tokens agree before the first difference; ``margin`` is the reference's lead of the
    best logit over the next where they part (0 where they do not)."""

    prompt_tokens: int
    chunk: int
    tokens: int
    same: int
    margin: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What melt-verify tolerates. ``kl``: mean KL divergence in nats; ``perplexity``: growth in percent; None: any."""

    kl: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class Accuracy:
    """The share of ``problems`` that are answered exactly, 0 to 1, by a package and by its checkpoint in float32."""

    problems: int
    package: float
    checkpoint: float

    def summary(self) -> str:
        """Part of a line for a person."""
        return f"{self.package:.1%} of {self.problems} answers exact, {self.checkpoint:.1%} in fp32"


@dataclass(frozen=True)
class Quality:
    """A quantized package against its checkpoint in float32, over ``positions`` tokens of ``text``.

    ``kl``: mean KL(checkpoint || package) of the next token's distribution, in nats; ``top1``: share of positions with
    the same best token; the perplexities are None for random tokens, which nothing predicts; ``accuracy``: of a task's
    answers, where it was asked for.
    """

    text: str
    positions: int
    kl: float
    top1: float
    perplexity: float | None
    checkpoint_perplexity: float | None
    limits: Limits
    accuracy: Accuracy | None = None

    @property
    def perplexity_change(self) -> float | None:
        """Growth of the perplexity in percent; None for random tokens."""
        if self.perplexity is None or self.checkpoint_perplexity is None:
            return None
        return 100 * (self.perplexity / self.checkpoint_perplexity - 1)

    def failures(self) -> list[str]:
        """What is over a limit, a sentence each. Not a number counts as over."""
        found, change = [], self.perplexity_change
        if self.limits.kl is not None and not self.kl <= self.limits.kl:
            found.append(f"quantization moved the logits by a KL of {self.kl:.2e}, the limit is {self.limits.kl:g}")
        if self.limits.perplexity is not None and change is not None and not change <= self.limits.perplexity:
            found.append(f"the perplexity grew by {change:.2f}%, the limit is {self.limits.perplexity:g}%")
        return found

    def summary(self) -> str:
        """One line for a person."""
        change = self.perplexity_change
        grown = "" if change is None else f", perplexity {self.perplexity:.2f} ({change:+.2f}%)"
        line = (
            f"KL {self.kl:.1e}, top-1 {self.top1:.1%}{grown} against fp32, on {self.positions} positions of {self.text}"
        )
        if self.accuracy is not None:
            line += f"; {self.accuracy.summary()}"
        return line


@dataclass
class ParityReport:
    """Everything that was compared. ``arithmetic`` says what ran the package; ``quality`` is of quantized ones."""

    precision: str
    dialect: str
    loops: int
    arithmetic: str
    tolerance: Tolerance
    states: list[StateError] = field(default_factory=list)
    logit_positions: int = 0
    kl_mean: float = 0.0
    kl_max: float = 0.0
    top1: float = 1.0
    exit_threshold: float | None = None
    exit_tokens: int = 0
    exit_same_depth: int = 0
    generations: list[GenerationResult] = field(default_factory=list)
    manifest_sha256: str = ""
    libraries: dict[str, str] = field(default_factory=dict)
    quality: Quality | None = None

    @property
    def worst(self) -> float:
        """The largest relative error of any state or logit."""
        return max((s.relative for s in self.states), default=0.0)

    def failures(self) -> list[str]:
        """What is outside the tolerance, a sentence each."""
        limit, found = self.tolerance, []
        for state in self.states:
            if not state.relative <= limit.relative:
                found.append(f"{state.quantity} of loop {state.loop} differs by {state.relative:.2e} (relative)")
        if not self.kl_mean <= limit.kl:
            found.append(f"the logits' mean KL divergence is {self.kl_mean:.2e}, the limit {limit.kl:.0e}")
        if self.top1 < limit.top1:
            found.append(f"the best token agrees at {self.top1:.1%} of positions, the limit is {limit.top1:.1%}")
        if limit.same_tokens:
            for run in self.generations:
                if run.same < run.tokens:
                    found.append(
                        f"greedy generation (chunk {run.chunk}) parts at token {run.same + 1} of {run.tokens}, "
                        f"where the best logit led by {run.margin:.1e}"
                    )
            if self.exit_same_depth < self.exit_tokens:
                found.append(f"{self.exit_tokens - self.exit_same_depth} tokens leave the loop at another depth")
        return found + ([] if self.quality is None else self.quality.failures())

    @property
    def passed(self) -> bool:
        return not self.failures()

    def summary(self) -> str:
        """One line for a person."""
        same = sum(run.same for run in self.generations)
        tokens = sum(run.tokens for run in self.generations)
        return (
            f"worst relative error {self.worst:.1e} (limit {self.tolerance.relative:.0e}), KL {self.kl_mean:.1e}, "
            f"top-1 {self.top1:.1%}, greedy tokens {same}/{tokens} the same"
        )

    def write(self, directory: Path) -> None:
        """Writes parity.json into a package, whole or not at all. Raises OSError."""
        content = {"passed": self.passed, "failures": self.failures(), **asdict(self)}
        with new_file(directory / PARITY) as made:
            made.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class StateErrors:
    """Relative errors, max |got - expected| over max |expected|, of each quantity and loop; and logits' distances."""

    def __init__(self) -> None:
        self.difference: dict[tuple[str, int], float] = {}
        self.scale: dict[tuple[str, int], float] = {}
        self.kl: list[float] = []
        self.agree: list[bool] = []

    def compare(
        self, quantity: str, loop: int, got: NDArray[Any], expected: NDArray[Any], scale: float = 1e-30
    ) -> None:
        """Takes in one pair of arrays; ``scale`` is the least to divide by. NaN counts as infinitely wrong."""
        got, expected = got.astype(np.float64), expected.astype(np.float64)
        difference, key = float(np.abs(got - expected).max()), (quantity, loop)
        difference = difference if np.isfinite(difference) else float("inf")
        self.difference[key] = max(self.difference.get(key, 0.0), difference)
        self.scale[key] = max(self.scale.get(key, scale), float(np.abs(expected).max()))

    def compare_logits(self, got: NDArray[Any], expected: NDArray[Any]) -> None:
        """KL(expected || got) in nats, and whether the best token is the same, for each row (positions, vocab)."""
        kl, agree = agreement(log_softmax(got), log_softmax(expected))
        self.kl += kl
        self.agree += agree

    def into(self, report: ParityReport) -> None:
        """Moves the figures into a report."""
        report.states = [
            StateError(quantity, loop, difference / self.scale[quantity, loop])
            for (quantity, loop), difference in sorted(self.difference.items())
        ]
        report.logit_positions = len(self.kl)
        report.kl_mean, report.kl_max = float(np.mean(self.kl)), float(np.max(self.kl))
        report.top1 = float(np.mean(self.agree))


def agreement(got: NDArray[Any], expected: NDArray[Any]) -> tuple[list[float], list[bool]]:
    """KL(expected || got) in nats, and whether the best token is the same, of log-probabilities (positions, vocab)."""
    return (np.exp(expected) * (expected - got)).sum(-1).tolist(), (got.argmax(-1) == expected.argmax(-1)).tolist()


def log_softmax(logits: NDArray[Any]) -> NDArray[Any]:
    """Logarithms of the probabilities (positions, vocab), in float64."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def common_prefix(first: Iterable[int], second: Iterable[int]) -> int:
    """How many tokens agree from the beginning."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
