"""What is compared between a checkpoint and its package, how closely they must agree, and what came out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from melt_runtime.package.files import new_file
from melt_runtime.package.manifest import PARITY, Manifest

from .distances import MULTIPLE, Distances, OwnError


@dataclass(frozen=True)
class Tolerance:
    """Limits. ``relative``: max |a - b| over max |b|, for every state at every loop (max |a - b| alone for an exit
    probability, whose scale is 1); ``kl``: mean KL divergence of the
    logits in nats; ``top1``: least share of positions with the same best token; ``same_tokens``: whether greedy
    generation and exit depths must be identical. A model that makes more of rounding has wider ones: ``OwnError``."""

    relative: float
    kl: float
    top1: float
    same_tokens: bool


TOLERANCES = {
    "fp32": Tolerance(relative=1e-4, kl=1e-6, top1=1.0, same_tokens=True),
    "fp16": Tolerance(relative=3e-2, kl=1e-3, top1=0.98, same_tokens=False),
    "bf16": Tolerance(relative=2e-1, kl=2e-2, top1=0.9, same_tokens=False),
}
# A quantity with so wide a limit would let a planted error pass. In these loops every weight has its effect, so that
# there it must tell; in later ones a model may be beyond any comparison.
_VAGUE, _TELLING_LOOPS = 0.1, 2
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
    """The relative error of one quantity in one loop, over all chunks and sequences, in the ``layer`` where it comes
    closest to its ``limit`` (None: it is of the whole stack). ``own``: the same of PyTorch's float32, against its
    float64; 0 where that was not measured."""

    quantity: str
    loop: int
    relative: float
    limit: float
    own: float = 0.0
    layer: int | None = None


@dataclass
class GenerationResult:
    """One greedy run: ``same`` tokens agree before the first difference; ``margin`` is how far the reference's best
    logit stands above that of the package's token, ``got``, where they part. They may part at a tie: where rounding,
    measured there, can move the two by more than ``tie``'s half each."""

    prompt_tokens: int
    chunk: int
    tokens: int
    same: int
    margin: float = 0.0
    got: int | None = None
    tie: float = 0.0

    @property
    def parted(self) -> bool:
        """Whether the tokens differ from some place on."""
        return self.same < self.tokens

    @property
    def excused(self) -> bool:
        """Whether they part where either token is right."""
        return self.parted and self.margin <= self.tie


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
    answers, where it was asked for. All of it is of the arithmetic that the package runs: ``activations`` ("int8" or
    "float") are what its quantized weights are multiplied with, None without any; ``float_kl`` is what ``kl`` would be
    with float ones, so that the rest is what rounding activations costs.
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
    """All that was compared.

    - ``backend``, ``arithmetic``: what ran the package, and how it computes.
    - ``own_kl``: the KL divergence of PyTorch's float32 from its float64.
    - ``quality``: of a quantized package.
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
    backend: str = "onnxruntime"

    def take(self, found: Distances, own: OwnError) -> None:
        """Takes in what a package's run differs by, and what may be made of rounding."""
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
        """The state or logit that comes closest to its limit."""
        return max(self.states, key=lambda state: state.relative / state.limit)

    @property
    def worst(self) -> float:
        """Its relative error; 0 where nothing was compared."""
        return self.closest.relative if self.states else 0.0

    @property
    def kl_limit(self) -> float:
        """Of the logits' mean KL divergence: it grows with the square of an error."""
        return max(self.tolerance.kl, MULTIPLE**2 * self.own_kl)

    def failures(self) -> list[str]:
        """What is outside the tolerance, a sentence each."""
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
        """One line for a person."""
        same = sum(run.same for run in self.generations)
        tokens = sum(run.tokens for run in self.generations)
        parted = sum(run.excused for run in self.generations)
        ties = f" ({parted} of {len(self.generations)} runs part at a tie)" if parted else ""
        return (
            f"worst relative error {self.error()}, KL {self.kl_mean:.1e}, "
            f"top-1 {self.top1:.1%}, greedy tokens {same}/{tokens} the same{ties}"
        )

    def error(self) -> str:
        """The error that comes closest to its limit, the limit, and what PyTorch's own float32 differs by there."""
        if not self.states:
            return "none: nothing was compared"
        own = f"; PyTorch's own float32 is {self.closest.own:.0e} off its float64" if self.closest.own else ""
        return f"{self.worst:.1e} (limit {self.closest.limit:.0e}{own})"

    def write(self, directory: Path) -> None:
        """Writes parity.json into a package, whole or not at all. Raises OSError."""
        content = {"passed": self.passed, "failures": self.failures(), **asdict(self)}
        with new_file(directory / PARITY) as made:
            made.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
