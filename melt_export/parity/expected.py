"""PyTorch's side of a comparison: the states of every loop in float64, the error of its own float32, and greedy
tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from melt_runtime.package.manifest import Manifest
from melt_runtime.progress import Step as Progress
from melt_runtime.progress import no_progress
from numpy.typing import NDArray

from ..reference.float32_matmul import FLOAT32, FLOAT64, ORDERS, Arithmetic
from ..reference.pytorch import LoopTrace, Reference
from .distances import Distances, OwnError
from .report import ParityReport, tolerance_of
from .staggered import StaggeredCase

_TRACED_CHUNK = 128  # wider chunks are traced at this width, which needs less memory for the same mathematics
DECODE_STEPS = 2
LARGE_BYTES = 10**9  # of weights, or of the state of a traced batch


# By prompt, chunk and loop.
Traces: TypeAlias = list[list[list[LoopTrace]]]


@dataclass(frozen=True)
class Case:
    """Prompts that run together in the package and alone in PyTorch, and a few decoding steps after them."""

    prompts: list[list[int]]
    chunk: int
    tokens: list[list[int]]

    def traces(self, reference: Reference, loops: int, arithmetic: Arithmetic) -> Traces:
        """Run each prompt alone in PyTorch: its chunks, then single tokens."""
        found = []
        for prompt, more in zip(self.prompts, self.tokens, strict=True):
            chunks = [prompt[at : at + self.chunk] for at in range(0, len(prompt), self.chunk)]
            chunks += [[token] for token in more]
            found.append(reference.traces(chunks, loops, arithmetic=arithmetic)[0])
        return found


@dataclass(frozen=True)
class GreedyRun:
    """A prompt, its prefill chunk, PyTorch's greedy tokens, and each token's difference to the second-best logit."""

    prompt: list[int]
    chunk: int
    tokens: list[int]
    margins: list[float]

    def logits(self, reference: Reference, loops: int, at: int, arithmetic: Arithmetic) -> NDArray[Any]:
        """Return the logits (vocab,) from which token number ``at`` is chosen."""
        chunks = [self.prompt[start : start + self.chunk] for start in range(0, len(self.prompt), self.chunk)]
        chunks += [[token] for token in self.tokens[:at]]
        return reference.traces(chunks, loops, arithmetic=arithmetic)[0][-1][-1].logits[-1].astype(np.float64)


@dataclass(frozen=True)
class Expected:
    """PyTorch's results.

    - ``cases``: prompts and their traces; ``own``: PyTorch's float32 error on them.
    - ``prompt``, ``chunk``, ``threshold``, ``depths``: exit depths of a prompt's tokens at a threshold; None for a
      token whose depth rounding may change.
    - ``runs``: greedy runs.
    - ``staggered``: None for a package that cannot decode so.
    """

    cases: list[tuple[Case, Traces]]
    staggered: StaggeredCase | None
    own: OwnError
    prompt: list[int]
    chunk: int
    threshold: float | None
    depths: list[int | None]
    runs: list[GreedyRun]


def expected_of(
    reference: Reference,
    manifest: Manifest,
    tokens: int,
    *,
    lanes: int = 1,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Expected:
    """Compute PyTorch's side of a comparison with any package of these sizes.

    ``tokens``: greedy tokens per prompt. ``lanes``: tokens in flight in staggered decoding; below 2 there is none.
    """
    progress("PyTorch: loop by loop", 0, 0)
    rng = np.random.default_rng(seed)
    chunk, room = min(manifest.chunk, _TRACED_CHUNK), manifest.max_seq_len
    batch = min(manifest.max_batch, 3 if manifest.state_bytes(3) < LARGE_BYTES else 2)
    drawn = [
        _case(manifest, rng, [chunk + 3, max(chunk // 2, 1), 1][:batch], chunk),
        _case(manifest, rng, [4], 1),
    ]
    # A float32 package is compared with float64; one in half precision, which loses more anyway, with float32.
    truth = FLOAT64 if manifest.precision == "fp32" else FLOAT32
    cases = [(case, case.traces(reference, manifest.loops, truth)) for case in drawn]
    staggered = StaggeredCase.drawn(manifest, lanes, np.random.default_rng((seed, 1)), reference, truth)
    own = OwnError()
    if truth is FLOAT64:
        progress("PyTorch: its own rounding", 0, 0)
        own = _own_error(reference, cases, staggered, manifest.loops)
    prompt = drawn[0].prompts[0]
    threshold: float | None = None
    depths: list[int | None] = []
    if manifest.cache_loops is None and manifest.has_exit_gate:  # the tokens of a LoopLM never leave early
        threshold = _splitting_threshold(cases[0][1][0])
        chunks = [prompt[at : at + chunk] for at in range(0, len(prompt), chunk)]
        traces, spent = reference.traces(chunks, manifest.loops, threshold, truth)
        clear = _decided([loops[: manifest.loops - 1] for loops in traces], threshold, _exit_slack(own, manifest))
        depths = [
            depth if decided else None for depth, decided in zip(spent, clear or [True] * len(spent), strict=True)
        ]

    runs = []
    lengths = ((3 * manifest.chunk // 2, manifest.chunk), (7, manifest.chunk), (1, manifest.chunk), (9, 1))
    for length, size in lengths:
        ids = rng.integers(0, manifest.vocab_size, max(1, min(length, room // 2))).tolist()
        greedy = reference.greedy(ids, min(tokens, room - len(ids) + 1), manifest.loops, size)
        runs.append(GreedyRun(ids, size, *greedy))
        progress("PyTorch: greedy tokens", len(lengths), 1)
    return Expected(cases, staggered, own, prompt, chunk, threshold, depths, runs)


def measure_ties(report: ParityReport, expected: Expected, reference: Callable[[], Reference]) -> None:
    """Measure whether rounding could have swapped the two tokens where a package's greedy tokens first differ.

    Later tokens have accumulated more rounding errors. The results go to the report; nothing is measured if tokens may
    differ anyway.
    """
    parted = [pair for pair in zip(report.generations, expected.runs, strict=True) if pair[0].parted]
    if not report.tolerance.same_tokens or not parted:
        return
    opened = reference()
    for result, run in parted:
        right = run.logits(opened, report.loops, result.same, FLOAT64)
        draws = [run.logits(opened, report.loops, result.same, arithmetic) for arithmetic in ORDERS]
        off = max(float(np.abs(draw - right).max()) for draw in draws)
        result.margin = float(right.max() - right[result.got])
        result.tie = OwnError(logit=off).tie


def _case(manifest: Manifest, rng: np.random.Generator, lengths: Sequence[int], chunk: int) -> Case:
    """Draw random prompts and decoding steps."""
    prompts, steps = [], []
    for length in lengths:
        length = max(1, min(length, manifest.max_seq_len - DECODE_STEPS))
        prompts.append(rng.integers(0, manifest.vocab_size, length).tolist())
        more = DECODE_STEPS if manifest.max_seq_len > length + 1 else 0
        steps.append(rng.integers(0, manifest.vocab_size, more).tolist())
    return Case(prompts, chunk, steps)


def _own_error(
    reference: Reference, cases: list[tuple[Case, Traces]], staggered: StaggeredCase | None, loops: int
) -> OwnError:
    """Return PyTorch's float32 error on these traces, over several orders of summation."""
    draws = []
    for arithmetic in ORDERS:
        found = Distances()
        for case, traces in cases:
            for sequences in zip(case.traces(reference, loops, arithmetic), traces, strict=True):
                for chunks in zip(*sequences, strict=True):
                    for pair in zip(*chunks, strict=True):
                        found.compare_trace(*pair)
        if staggered is not None:
            staggered.compare(staggered.run(reference, arithmetic).runs, found)
        draws.append(found)
    return OwnError.of(draws)


def _exit_slack(own: OwnError, manifest: Manifest) -> float:
    """Return how far a package's probability of having left may be from PyTorch's, over all loops."""
    least = tolerance_of(manifest).relative
    return sum(own.limit(("exit probability", loop, None), least) for loop in range(1, manifest.loops + 1))


def _decided(chunks: list[list[LoopTrace]], threshold: float, slack: float) -> list[bool]:
    """Return for each token whether its probability of having left stays further than ``slack`` from the threshold.

    chunks: the loops after which a token may leave. Returns nothing if there are none.
    """
    found: list[bool] = []
    for loops in filter(None, chunks):
        remaining = np.ones_like(_exits_of(loops[0]))
        clear = np.ones(remaining.shape, bool)
        for trace in loops:
            remaining = remaining * (1 - _exits_of(trace))
            clear &= np.abs(1 - remaining - threshold) > slack
        found += clear.tolist()
    return found


def _splitting_threshold(chunks: list[list[LoopTrace]]) -> float:
    """Return a threshold at which about half of the tokens leave early, in the middle of a gap, so that rounding
    decides none."""
    reached = []
    for loops in chunks:
        remaining = np.ones_like(_exits_of(loops[0]))
        for trace in loops[:-1]:
            remaining = remaining * (1 - _exits_of(trace))
            reached += (1 - remaining).tolist()
    values = np.unique(np.array([0.0, *reached, 1.0]))
    middle = values[len(values) // 4 : max(len(values) * 3 // 4, len(values) // 4 + 2)]
    gap = int(np.argmax(np.diff(middle)))
    return float((middle[gap] + middle[gap + 1]) / 2)


def _exits_of(trace: LoopTrace) -> NDArray[Any]:
    """Return the exit probability of a model with an exit gate."""
    assert trace.exit_probability is not None
    return trace.exit_probability
