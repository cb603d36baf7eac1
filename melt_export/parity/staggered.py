"""Staggered decoding by a package: whether it computes what PyTorch does, and how far it is from plain decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from melt_runtime import LoopDriver, LoopSettings, Runtime
from melt_runtime.backends.bindings import lane_window
from melt_runtime.backends.lane_stages import Lane
from melt_runtime.backends.lanes import ChunkLanes
from melt_runtime.decoding.start import start_row
from melt_runtime.package.manifest import Manifest
from melt_runtime.package.staggered_cost import StaggeredCost
from melt_runtime.progress import Step

from ..reference.float32_matmul import Arithmetic
from ..reference.pytorch import Reference
from ..reference.staggered import StaggeredRun, schedule, staggered_runs
from .distances import Distances, agreement, log_softmax
from .exact_match import Problem, package_accuracy
from .quality import HeldOut, text_logits

COST_TOKENS = 256  # most tokens that the cost is measured on


def lanes_of(manifest: Manifest, loops: int) -> int:
    """Return the most tokens in flight of ``loops`` loops each; below 2, the package cannot decode staggered."""
    return min(lane_window(manifest), loops) if manifest.staggers else 1


@dataclass(frozen=True)
class StaggeredCase:
    """A prompt, in chunks, and tokens that run staggered after it; ``runs``: PyTorch's."""

    prompt: list[int]
    chunk: int
    tokens: list[int]
    loops: int
    lanes: int
    runs: list[StaggeredRun]

    @classmethod
    def drawn(
        cls, manifest: Manifest, lanes: int, rng: np.random.Generator, reference: Reference, truth: Arithmetic
    ) -> StaggeredCase | None:
        """Draw a random case and run it in PyTorch. None if the package has no room for two tokens in flight."""
        room = manifest.max_seq_len
        if lanes < 2 or room < 3:
            return None
        count = min(lanes + 3, room - 1)
        prompt, tokens = (
            rng.integers(0, manifest.vocab_size, size).tolist() for size in (min(lanes + 2, room - count), count)
        )
        chunk = min(manifest.chunk, 8)
        return cls(prompt, chunk, tokens, manifest.loops, lanes, []).run(reference, truth)

    def run(self, reference: Reference, arithmetic: Arithmetic) -> StaggeredCase:
        """Return the case with PyTorch's runs in another arithmetic."""
        runs = staggered_runs(reference, self.prompt, self.tokens, self.loops, self.chunk, self.lanes, arithmetic)
        return replace(self, runs=runs)

    def compare(self, got: Iterable[StaggeredRun], errors: Distances) -> None:
        """Add the distances of other runs from these, each token's under the loop that it is in."""
        for mine, theirs in zip(got, self.runs, strict=True):
            for at, loop in enumerate(theirs.loops):
                errors.compare("staggered hidden", loop, mine.hidden[at], theirs.hidden[at])
                errors.compare("staggered logits", loop, mine.logits[at], theirs.logits[at])

    def compare_package(self, runtime: Runtime, errors: Distances) -> None:
        """Run the case in a package and add the distances; nothing if its backend cannot decode staggered."""
        driver = runtime.driver(1)
        if driver.state.lanes_fit() is not None:
            return
        driver.append([self.prompt], LoopSettings(self.loops, chunk=self.chunk))
        self.compare(package_runs(driver, self.tokens, self.loops, self.lanes), errors)


def package_runs(driver: LoopDriver, tokens: Sequence[int], loops: int, lanes: int) -> Iterator[StaggeredRun]:
    """Run given tokens staggered behind those of a driver's only sequence, and yield every run.

    The driver's lengths stay as they are.
    """
    flight, start = ChunkLanes(driver.state), int(driver.lengths[0])
    settings = LoopSettings(loops)
    for final, before in schedule(len(tokens), loops, lanes):
        given = [Lane(tokens[final + at], ran) for at, ran in enumerate(before)]
        if before[-1] == 0:
            at = start + final + len(before) - 1
            given[-1] = given[-1]._replace(start=start_row(driver.manifest, settings, at))
        [reads] = flight.run([given], np.array([start + final], np.int64))
        logits, after = np.stack([read.logits for read in reads]), tuple(ran + 1 for ran in before)
        yield StaggeredRun(after, flight.hidden(), logits)
        if after[0] == loops:
            flight.left(0)


def staggered_cost(
    runtime: Runtime, held: HeldOut, problems: list[Problem], loops: int, progress: Step
) -> StaggeredCost | None:
    """Run a package over text: staggered, plainly and in its chunks, each token given. Count its answers to problems
    both ways. None if its backend cannot decode staggered."""
    lanes, chunk, driver = lanes_of(runtime.manifest, loops), runtime.manifest.chunk, runtime.driver(1)
    if lanes < 2 or driver.state.lanes_fit() is not None:
        return None
    found: dict[str, list[tuple[float, bool]]] = {"staggered": [], "chunked": []}
    for ids in held.sequences:
        plain = log_softmax(text_logits(driver, ids, LoopSettings(loops, chunk=1)))
        chunked = text_logits(driver, ids, LoopSettings(loops))
        driver.reset()
        runs = package_runs(driver, ids, loops, lanes)
        staggered = np.stack([run.logits[0] for run in runs if run.loops[0] == loops])
        for name, logits in (("staggered", staggered), ("chunked", chunked)):
            found[name] += zip(*agreement(log_softmax(logits), plain), strict=True)
        progress("package: staggered decoding", len(held.sequences), 1)
    (kl, top1), (chunk_kl, chunk_top1) = (np.mean(pairs, axis=0).tolist() for pairs in found.values())
    cost = StaggeredCost(lanes, held.text, len(found["staggered"]), kl, top1, chunk, chunk_kl, chunk_top1)
    if not problems:
        return cost
    plain_right, right = (package_accuracy(runtime, problems, progress, pipeline) for pipeline in ("off", "on"))
    return replace(cost, problems=len(problems), right=right, plain_right=plain_right)
