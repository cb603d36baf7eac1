"""The used positions of the caches cross to the host and back, raw, on every backend's stand-in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_parts
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import ArgumentError, LoopDriver, LoopSettings, Runtime
from melt_runtime.backends.bindings import cache_buffers
from melt_runtime.backends.buffers import widened
from melt_runtime.backends.onnxruntime_cpu import OnnxRuntimeState

every_backend = test_parts.runtime
SETTINGS = LoopSettings(3)
PROMPTS = [list(range(5, 18)), [20, 21, 22], list(range(23, 32))]


def filled(runtime: Runtime) -> LoopDriver:
    driver = runtime.driver(3)
    driver.append(PROMPTS, SETTINGS)
    return driver


def test_rows_are_those_of_the_caches(every_backend: Runtime) -> None:
    driver = filled(every_backend)
    positions = driver.state.read_positions(2, 1, 7)
    for state in driver.manifest.states:
        if state.by_loop:
            for loop in range(int(state.shape[0])):
                expected = driver.state.read(state.input, (loop, 2, slice(None), slice(1, 7)))
                assert np.array_equal(positions.pop(f"{state.input}/{loop}"), expected)
        elif state.kind != "swap":
            assert np.array_equal(
                positions.pop(state.input), driver.state.read(state.input, (2, slice(None), slice(1, 7)))
            )
    assert positions == {}


def test_a_sequence_whose_rows_were_written_elsewhere_goes_on_as_before(every_backend: Runtime) -> None:
    driver, other = filled(every_backend), filled(every_backend)
    for slot in (0, 2):  # into the middle, and past it
        other.clear(slot)
        half = len(PROMPTS[slot]) // 2
        other.restore(slot, driver.state.read_positions(slot, 0, half), driver.depth[slot][:half])
        other.restore(slot, driver.state.read_positions(slot, half, len(PROMPTS[slot])), driver.depth[slot][half:])
    for token in range(3):
        tokens = [[7 + token], [9], [11 + token]]
        assert np.array_equal(other.append(tokens, SETTINGS), driver.append(tokens, SETTINGS))
    assert other.depth == driver.depth


def test_a_part_reads_and_writes_its_own_rows(every_backend: Runtime) -> None:
    driver = filled(every_backend)
    part = driver.part(1, 2)
    assert part is not None
    expected = driver.state.read_positions(2, 0, 9)
    untouched = driver.state.read_positions(1, 0, 3)
    assert all(np.array_equal(values, expected[name]) for name, values in part.state.read_positions(1, 0, 9).items())
    zeros = {name: np.zeros_like(values) for name, values in expected.items()}
    part.state.write_positions(1, 0, zeros)
    assert not any(values.any() for values in driver.state.read_positions(2, 0, 9).values())
    assert all(np.array_equal(values, untouched[name]) for name, values in driver.state.read_positions(1, 0, 3).items())


def test_reading_rows_between_a_token_and_its_draw_changes_no_logits(every_backend: Runtime) -> None:
    driver, other = filled(every_backend), filled(every_backend)
    expected = other.advance([[7], [8], [9]], SETTINGS)
    logits = driver.advance([[7], [8], [9]], SETTINGS)
    driver.state.read_positions(0, 0, 14)
    assert np.array_equal(logits.full(), expected.full())


def test_rows_that_do_not_fit_are_refused_and_nothing_is_written(every_backend: Runtime) -> None:
    driver = filled(every_backend)
    positions = driver.state.read_positions(0, 0, 5)
    *_, last = positions
    zeros = {name: np.zeros_like(values) for name, values in positions.items()}
    most = driver.manifest.cache_rows
    for wrong in (
        {**zeros, "hidden/0": zeros[last]},
        {**zeros, last: zeros[last][:, :, 1:]},
        {**zeros, last: zeros[last].astype(np.float64)},
        {**zeros, last: zeros[last][0]},
    ):
        with pytest.raises(ArgumentError):
            driver.state.write_positions(0, 0, wrong)
    for slot, start in ((3, 0), (-1, 0), (0, most - 4), (0, -1)):
        with pytest.raises(ArgumentError, match="are not among"):
            driver.state.write_positions(slot, start, zeros)
        with pytest.raises(ArgumentError, match="are not among"):
            driver.state.read_positions(slot, start, start + 5)
    with pytest.raises(ArgumentError, match="not those of 4 tokens"):
        driver.restore(1, positions, [3] * 4)
    assert all(np.array_equal(values, positions[name]) for name, values in driver.state.read_positions(0, 0, 5).items())


def test_a_looplm_may_read_the_caches_of_the_loops_that_ran(
    make_looplm: MakeCheckpoint, make_package: MakePackage
) -> None:
    driver = Runtime.load(make_package(make_looplm(), chunk=8)).driver()
    driver.append([PROMPTS[0]], LoopSettings(2))
    assert {name.split("/")[1] for name in driver.state.read_positions(0, 0, 5, loops=2)} == {"0", "1"}
    assert {name.split("/")[1] for name in driver.state.read_positions(0, 0, 5)} == {"0", "1", "2", "3"}


def test_bfloat16_rows_are_bits(tiny_package: Path) -> None:
    state = Runtime.load(tiny_package).driver(2).state  # no CPU runs bf16, but caches are bytes like all others
    assert isinstance(state, OnnxRuntimeState)
    narrow = (one if one.kind == "swap" else replace(one, dtype="bfloat16") for one in state.manifest.states)
    state.manifest = replace(state.manifest, states=tuple(narrow))
    name = next(iter(cache_buffers(state.manifest)))
    bits = np.arange(1, 2 * 3 * 16 + 1, dtype=np.uint16).reshape(2, 3, 16) + np.uint16(0x3F00)
    state.write_positions(1, 4, {name: bits})
    positions = state.read_positions(1, 4, 7)[name]
    assert positions.dtype == np.uint16
    assert np.array_equal(positions, bits)
    assert np.array_equal(state.read(name, (1, slice(None), slice(4, 7))), widened(bits))


def test_going_back_drops_lengths_and_depths_together(every_backend: Runtime) -> None:
    driver = filled(every_backend)
    driver.truncate(0, 6)
    assert (driver.lengths.tolist(), [len(depth) for depth in driver.depth]) == ([6, 3, 9], [6, 3, 9])
    for length in (-1, 7):
        with pytest.raises(ArgumentError, match="between 0 and the 6"):
            driver.truncate(0, length)
