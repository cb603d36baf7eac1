"""Report of a comparison, and the limits that it must keep."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from melt_runtime.package.files import new_file
from melt_runtime.package.manifest import PARITY, Manifest
from melt_runtime.package.staggered_cost import StaggeredCost

from .distances import MULTIPLE, Distances, OwnError


@dataclass(frozen=True)
class Tolerance:
    """Limits of a precision.

    - ``relative``: max |a - b| over max |b|, for every state at every loop (max |a - b| for an exit probability).
    - ``kl``: mean KL divergence of the logits, in nats.
    - ``top1``: smallest share of positions with the same best token.
    - ``same_tokens``: whether greedy generation and exit depths must be identical.

    A model that amplifies rounding errors has wider limits: see ``OwnError``.
    """

    relative: float
    kl: float
    top1: float
    same_tokens: bool


TOLERANCES = {
    "fp32": Tolerance(relative=1e-4, kl=1e-6, top1=1.0, same_tokens=True),
    "fp16": Tolerance(relative=3e-2, kl=1e-3, top1=0.98, same_tokens=False),
    "bf16": Tolerance(relative=2e-1, kl=2e-2, top1=0.9, same_tokens=False),
}
# A limit this wide would let a wrong weight pass. In these loops, in which every weight has its effect, limits must be
# narrower; in later ones rounding errors may have grown beyond any comparison.
_VAGUE, _TELLING_LOOPS = 0.1, 2
# Of two computations that agree almost to the last bit, one may round a cached value up and the other down.
_CACHE_TOLERANCES = {
    "int8": Tolerance(relative=3e-2, kl=1e-3, top1=0.98, same_tokens=False),
    "int4": Tolerance(relative=3e-1, kl=2e-2, top1=0.9, same_tokens=False),
}


def tolerance_of(manifest: Manifest) -> Tolerance:
    """Return the limits of a package, by its cache if that is quantized, else by its precision."""
    return _CACHE_TOLERANCES[manifest.cache["kind"]] if manifest.cache else TOLERANCES[manifest.precision]


@dataclass
class StateError:
    """Relative error of one quantity in one loop, over all chunks and sequences.

    - ``layer``: the one whose error is closest to its ``limit`` (None: the whole stack).
    - ``own``: the error of PyTorch's float32 against its float64; 0 if it was not measured.
    """

    quantity: str
    loop: int
    relative: float
    limit: float
    own: float = 0.0
    layer: int | None = None


@dataclass
class GenerationResult:
    """One greedy run.

    - ``same``: number of tokens before the first difference.
    - ``margin``: difference of the reference's best logit and its logit of ``got``, the package's token at that point.
    - ``tie``: largest margin that rounding, measured at that token, can explain.
    """

    prompt_tokens: int
    chunk: int
    tokens: int
    same: int
    margin: float = 0.0
    got: int | None = None
    tie: float = 0.0

    @property
    def parted(self) -> bool:
        """Whether any token differs."""
        return self.same < self.tokens

    @property
    def excused(self) -> bool:
        """Whether rounding explains the first difference."""
        return self.parted and self.margin <= self.tie


@dataclass(frozen=True)
class Limits:
    """Limits of melt-verify. ``kl``: mean KL divergence in nats; ``perplexity``: growth in percent; None: no limit."""

    kl: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class Accuracy:
    """Shares (0 to 1) of ``problems`` that a package, and its checkpoint in float32, answer exactly."""

    problems: int
    package: float
    checkpoint: float

    def summary(self) -> str:
        """Describe the shares, as part of a line."""
        return f"{self.package:.1%} of {self.problems} answers exact, {self.checkpoint:.1%} in fp32"


@dataclass(frozen=True)
class Quality:
    """A quantized package against its checkpoint in float32, over ``positions`` tokens of ``text``.

    - ``kl``: mean KL(checkpoint || package) of the next token's distribution, in nats.
    - ``top1``: share of positions with the same best token.
    - the perplexities: None for random tokens.
    - ``accuracy``: of a task's answers, if asked for.
    - ``activations``: "int8" or "float", with which quantized weights are multiplied; None without such weights.
    - ``float_kl``: ``kl`` with float activations; the rest of ``kl`` comes from rounding activations.
    """

    text: str
    positions: int
    kl: float
    top1: float
    perplexity: float | None
    checkpoint_perplexity: float | None
    limits: Limits
    accuracy: Accuracy | None = None
    activations: str | None = None
    float_kl: float | None = None

    @property
    def perplexity_change(self) -> float | None:
        """Growth of the perplexity in percent; None for random tokens."""
        if self.perplexity is None or self.checkpoint_perplexity is None:
            return None
        return 100 * (self.perplexity / self.checkpoint_perplexity - 1)

    def failures(self) -> list[str]:
        """Return a sentence for each limit that is exceeded. NaN exceeds every limit."""
        found, change = [], self.perplexity_change
        if self.limits.kl is not None and not self.kl <= self.limits.kl:
            found.append(f"quantization moved the logits by a KL of {self.kl:.2e}, the limit is {self.limits.kl:g}")
        if self.limits.perplexity is not None and change is not None and not change <= self.limits.perplexity:
            found.append(f"the perplexity grew by {change:.2f}%, the limit is {self.limits.perplexity:g}%")
        return found

    def summary(self) -> str:
        """Describe the quality in one line."""
        change = self.perplexity_change
        grown = "" if change is None else f", perplexity {self.perplexity:.2f} ({change:+.2f}%)"
        how = {"int8": " with 8-bit activations", "float": " with float activations"}.get(self.activations or "", "")
        if self.float_kl is not None:
            how += f" ({self.float_kl:.1e} with float ones: --activations float)"
        line = (
            f"KL {self.kl:.1e}{how}, top-1 {self.top1:.1%}{grown} against fp32, "
            f"on {self.positions} positions of {self.text}"
        )
        if self.accuracy is not None:
            line += f"; {self.accuracy.summary()}"
        return line


@dataclass
class ParityReport:
    """Results of a comparison.

    - ``backend``: ran the package, in the ``arithmetic`` described.
    - ``quality``: of quantized packages.
    - ``staggered``: what staggered decoding costs; None where a package cannot.
    - ``own_kl``: KL divergence of PyTorch's float32 from its float64.
    """

    precision: str
    dialect: str
    loops: int
    arithmetic: str
    tolerance: Tolerance
    states: list[StateError] = field(default_factory=list)
    own_kl: float = 0.0
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
    staggered: StaggeredCost | None = None
    backend: str = "onnxruntime"

    def take(self, found: Distances, own: OwnError) -> None:
        """Add the distances of a package's run, with limits that allow for rounding."""
        closest: dict[tuple[str, int], StateError] = {}
        for key, relative in sorted(found.relative.items(), key=lambda item: item[0][:2]):
            quantity, loop, layer = key
            error = StateError(
                quantity, loop, relative, own.limit(key, self.tolerance.relative), own.relative.get(key, 0.0), layer
            )
            before = closest.get((quantity, loop))
            if before is None or error.relative / error.limit > before.relative / before.limit:
                closest[quantity, loop] = error
        self.states = list(closest.values())
        self.logit_positions = len(found.kl)
        self.kl_mean, self.kl_max = float(np.mean(found.kl)), float(np.max(found.kl))
        self.top1 = float(np.mean(found.agree))
        self.own_kl = own.kl

    @property
    def closest(self) -> StateError:
        """The state or logit whose error is closest to its limit."""
        return max(self.states, key=lambda state: state.relative / state.limit)

    @property
    def worst(self) -> float:
        """The relative error of ``closest``; 0 if nothing was compared."""
        return self.closest.relative if self.states else 0.0

    @property
    def kl_limit(self) -> float:
        """Limit of the logits' mean KL divergence, which grows with the square of an error."""
        return max(self.tolerance.kl, MULTIPLE**2 * self.own_kl)

    def failures(self) -> list[str]:
        """Return a sentence for everything beyond its limit."""
        limit, found = self.tolerance, []
        vague = max(_VAGUE, MULTIPLE * limit.relative)
        for state in self.states:
            if state.loop <= _TELLING_LOOPS and state.limit > vague:
                found.append(
                    f"nothing can be told from {state.quantity} of loop {state.loop}: PyTorch's own float32 differs by "
                    f"{state.own:.1e} from its float64"
                )
            elif not state.relative <= state.limit:
                found.append(
                    f"{state.quantity} of loop {state.loop} differs by {state.relative:.2e} (relative), the limit is "
                    f"{state.limit:.1e}"
                )
        if not self.kl_mean <= self.kl_limit:
            found.append(f"the logits' mean KL divergence is {self.kl_mean:.2e}, the limit {self.kl_limit:.0e}")
        if self.top1 < limit.top1:
            found.append(f"the best token agrees at {self.top1:.1%} of positions, the limit is {limit.top1:.1%}")
        if limit.same_tokens:
            for run in self.generations:
                if run.parted and not run.excused:
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
        """Describe the result in one line."""
        same = sum(run.same for run in self.generations)
        tokens = sum(run.tokens for run in self.generations)
        parted = sum(run.excused for run in self.generations)
        ties = f" ({parted} of {len(self.generations)} runs part at a tie)" if parted else ""
        return (
            f"worst relative error {self.error()}, KL {self.kl_mean:.1e}, "
            f"top-1 {self.top1:.1%}, greedy tokens {same}/{tokens} the same{ties}"
        )

    def error(self) -> str:
        """Describe the error closest to its limit, the limit, and PyTorch's own float32 error there."""
        if not self.states:
            return "none: nothing was compared"
        own = f"; PyTorch's own float32 is {self.closest.own:.0e} off its float64" if self.closest.own else ""
        return f"{self.worst:.1e} (limit {self.closest.limit:.0e}{own})"

    def write(self, directory: Path) -> None:
        """Write parity.json into a package, completely or not at all. Raises OSError."""
        content = {"passed": self.passed, "failures": self.failures(), **asdict(self)}
        with new_file(directory / PARITY) as made:
            made.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
