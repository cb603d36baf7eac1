"""Staggered decoding by a package: whether it computes what PyTorch does, and how far it is from plain decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from melt_runtime import LoopDriver, LoopSettings, Runtime
from melt_runtime.backends.bindings import buffer_name
from melt_runtime.backends.buffers import BufferState, StridedRegion
from melt_runtime.backends.control import LoopControl
from melt_runtime.package.manifest import Manifest
from melt_runtime.package.specs import ITEM_BYTES
from melt_runtime.package.staggered_cost import StaggeredCost
from melt_runtime.progress import Step
from numpy.typing import NDArray

from ..reference.float32_matmul import Arithmetic
from ..reference.pytorch import Reference
from ..reference.staggered import StaggeredRun, schedule, staggered_runs
from .distances import Distances, agreement, log_softmax
from .quality import HeldOut, text_logits

COST_TOKENS = 256  # most tokens that the cost is measured on


def lanes_of(manifest: Manifest) -> int:
    """Return the most tokens in flight, at most as many as loops; below 2, the package cannot decode staggered."""
    return min(manifest.loops, manifest.chunk) if manifest.staggers else 1


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
        cls, manifest: Manifest, rng: np.random.Generator, reference: Reference, truth: Arithmetic
    ) -> StaggeredCase | None:
        """Draw a random case and run it in PyTorch. None if the package has no room for two tokens in flight."""
        lanes, room = lanes_of(manifest), manifest.max_seq_len
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
        """Run the case in a package and add the distances."""
        driver = runtime.driver(1)
        driver.append([self.prompt], LoopSettings(self.loops, chunk=self.chunk))
        self.compare(package_runs(driver, self.tokens, self.loops, self.lanes), errors)


def package_runs(driver: LoopDriver, tokens: Sequence[int], loops: int, lanes: int) -> Iterator[StaggeredRun]:
    """Run given tokens staggered behind those of a driver's only sequence, and yield every run.

    The driver's lengths stay as they are. Columns move through the host's memory, on every backend alike.
    """
    state, start = driver.state, int(driver.lengths[0])
    columns: dict[str, NDArray[np.uint8]] = {}
    for final, before in schedule(len(tokens), loops, lanes):
        if before[-1] == 0:
            state.embed(np.array([[tokens[final + len(before) - 1]]]))
            entered = _columns(state, 1)
            columns = {name: np.concatenate((columns.get(name, new[:0]), new)) for name, new in entered.items()}
        _put_columns(state, columns)
        first_loop = np.array([[done == 0 for done in before]])
        counts = np.array([len(before)], np.int64)
        control = LoopControl(first_loop, np.ones_like(first_loop), np.array([start + final]), counts)
        state.loop(control)
        after = tuple(done + 1 for done in before)
        yield StaggeredRun(after, state.read("hidden")[0], state.logits(np.arange(len(after))[None])[0].copy())
        columns = _columns(state, len(after))
        if after[0] == loops:
            state.commit(replace(control, chunk_lengths=np.ones(1, np.int64)))
            columns = {name: values[1:] for name, values in columns.items()}


def staggered_cost(runtime: Runtime, held: HeldOut, loops: int, progress: Step) -> StaggeredCost:
    """Run a package over text: staggered, plainly and in its chunks, each token given."""
    lanes, chunk = lanes_of(replace(runtime.manifest, loops=loops)), runtime.manifest.chunk
    driver = runtime.driver(1)
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
    return StaggeredCost(lanes, held.text, len(found["staggered"]), kl, top1, chunk, chunk_kl, chunk_top1)


def _columns(state: BufferState, count: int) -> dict[str, NDArray[np.uint8]]:
    """Return the bytes of hidden and latents, (columns, bytes), by the names of the states."""
    found = {}
    for name, buffer, step in _swapped(state, state.current):
        values = state.fetch(StridedRegion(buffer, 0, count * step), count * step, 1)
        found[name] = np.array(values).reshape(count, step)
    return found


def _put_columns(state: BufferState, columns: dict[str, NDArray[np.uint8]]) -> None:
    """Make these the columns of the current chunk."""
    state.current, state.width = 0, len(next(iter(columns.values())))
    for name, buffer, step in _swapped(state, 0):
        state.store(StridedRegion(buffer, 0, state.width * step), columns[name].reshape(1, -1))


def _swapped(state: BufferState, current: int) -> list[tuple[str, str, int]]:
    """Return name, buffer and bytes per column of every state that swaps."""
    return [
        (one.input, buffer_name(one, current), int(one.shape[-1]) * ITEM_BYTES[one.dtype])
        for one in state.manifest.states
        if one.kind == "swap"
    ]
