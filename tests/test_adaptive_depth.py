"""Each token thinks as long as it needs: thresholds, least loops, settled states, and batches of different depths."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import ArgumentError, LoopDriver, LoopSettings, Runtime
from melt_runtime.cli.main import app
from melt_runtime.package.specs import DIALECTS
from typer.testing import CliRunner

PROMPTS = [[5, 6, 7, 8], list(range(9, 21)), [30, 31]]


@pytest.fixture(scope="module", params=DIALECTS)
def runtime(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> Runtime:
    return Runtime.load(make_package(make_checkpoint(), dialect=request.param))


@pytest.fixture(scope="module")
def looplm(make_looplm: MakeCheckpoint, make_package: MakePackage) -> Runtime:
    return Runtime.load(make_package(make_looplm(), chunk=8))


def caches(driver: LoopDriver, slot: int) -> list[np.ndarray]:
    """What a sequence left in the caches."""
    rows = slice(0, int(driver.lengths[slot]))
    found = []
    for state in driver.manifest.states:
        if state.kind != "swap":
            index = (slice(None),) * (len(state.shape) - 4) + (slot, slice(None), rows)
            found.append(driver.state.read(state.input, index))
    return found


def ran(runtime: Runtime, prompts: list[list[int]], settings: Any) -> tuple[np.ndarray, LoopDriver]:
    """Logits after the prompts and one more token of each, and the driver."""
    driver = runtime.driver(len(prompts))
    driver.append(prompts, settings)
    return driver.append([[3]] * len(prompts), settings), driver


EARLY = [LoopSettings(3), LoopSettings(6, 0.7), LoopSettings(4, exit_change=0.5)]


@pytest.mark.parametrize("changed", [LoopSettings(1), LoopSettings(7), LoopSettings(4, 0.5), LoopSettings(4, 1.0, 3)])
def test_how_deep_one_sequence_thinks_changes_no_bit_of_the_others(runtime: Runtime, changed: LoopSettings) -> None:
    before, one = ran(runtime, PROMPTS, EARLY)
    after, other = ran(runtime, PROMPTS, [changed, *EARLY[1:]])
    assert not np.array_equal(before[0], after[0])
    assert np.array_equal(before[1:], after[1:])
    for slot in (1, 2):
        assert one.depth[slot] == other.depth[slot]
        for mine, theirs in zip(caches(one, slot), caches(other, slot), strict=True):
            assert np.array_equal(mine, theirs)


def test_sequences_of_different_depth_and_chunk_give_what_they_give_alone(runtime: Runtime) -> None:
    settings = [LoopSettings(2, chunk=3), LoopSettings(5, 0.8), LoopSettings(3, exit_change=0.4, chunk=1)]
    together, driver = ran(runtime, PROMPTS, settings)
    for slot, (prompt, own) in enumerate(zip(PROMPTS, settings, strict=True)):
        alone, single = ran(runtime, [prompt], own)
        assert driver.depth[slot] == single.depth[0]
        np.testing.assert_allclose(together[slot], alone[0], rtol=1e-4, atol=1e-5)  # padded chunks round differently


def test_loops_of_a_looplm_may_differ_in_a_batch(looplm: Runtime) -> None:
    settings = [LoopSettings(2), LoopSettings(4), LoopSettings(1)]
    together, driver = ran(looplm, PROMPTS, settings)
    assert [set(depth) for depth in driver.depth] == [{2}, {4}, {1}]
    for slot, (prompt, own) in enumerate(zip(PROMPTS, settings, strict=True)):
        np.testing.assert_allclose(together[slot], ran(looplm, [prompt], own)[0][0], rtol=1e-4, atol=1e-5)


def test_no_token_leaves_before_its_least_loops_and_all_may_after(runtime: Runtime) -> None:
    for least in (1, 3, 4):
        _, driver = ran(runtime, PROMPTS, LoopSettings(4, 0.0, min_loops=least))
        assert {loops for depth in driver.depth for loops in depth} == {least}


def test_a_token_leaves_once_its_hidden_state_has_settled(runtime: Runtime) -> None:
    share, loops = 0.5, 6
    driver, expected = runtime.driver(), []
    # A token alone in its chunk: what others do does not enter, so the full run says when it has settled.
    for token in range(9, 17):
        driver.reset()
        (chunk,) = driver.chunks([[token]])
        hidden = [driver.state.read("hidden")[0, 0] for _ in driver.loops(chunk, LoopSettings(loops))]
        change = [np.linalg.norm(b - a) / np.linalg.norm(b) for a, b in pairwise(hidden)]
        expected.append(next((loop + 2 for loop, value in enumerate(change) if value < share), loops))
    found = []
    for token in range(9, 17):
        driver.reset()
        driver.append([[token]], LoopSettings(loops, exit_change=share))
        found += driver.depth[0]
    assert found == expected
    assert len(set(found)) > 1


def test_one_state_is_nothing_to_compare_so_two_loops_run_at_least(runtime: Runtime) -> None:
    _, driver = ran(runtime, PROMPTS, LoopSettings(4, exit_change=1e9))
    assert {loops for depth in driver.depth for loops in depth} == {2}


def test_hidden_is_read_only_where_its_change_matters(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, reads = runtime.driver(2), []
    real = driver.state.read
    monkeypatch.setattr(driver.state, "read", lambda name: reads.append(name) or real(name))  # type: ignore[func-returns-value]
    driver.append([[5, 6], [7, 8]], [LoopSettings(3, 0.9), LoopSettings(2)])
    driver.append([[5], []], [LoopSettings(3), LoopSettings(3, exit_change=0.1)])  # the one that would look sits idle
    assert reads == []
    driver.append([[5], [6]], [LoopSettings(3), LoopSettings(3, exit_change=0.1)])
    assert reads == ["hidden"] * 2  # after the last loop nothing is left to decide


def test_a_batch_runs_no_more_loops_than_its_deepest_token(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, steps = runtime.driver(3), []
    real = driver.state.loop
    monkeypatch.setattr(driver.state, "loop", lambda control: steps.append(control.active.copy()) or real(control))  # type: ignore[func-returns-value]
    driver.append([[5], [6], []], [LoopSettings(2), LoopSettings(5), LoopSettings(9)])
    assert [active[:, 0].tolist() for active in steps] == [[True, True, False]] * 2 + [[False, True, False]] * 3


def test_what_was_saved_is_the_loops_that_did_not_run(tiny_package: Path) -> None:
    runtime = Runtime.load(tiny_package)
    full = runtime.generate([5, 6, 7], max_tokens=8, loops=4, ignore_eos=True, exit_threshold=1.0)
    early = runtime.generate([5, 6, 7], max_tokens=8, loops=4, ignore_eos=True, exit_threshold=0.7)
    assert full.saved == 0
    assert early.saved == 1 - sum(early.depth) / (4 * 10)
    assert early.saved > 0
    order = ["generate", str(tiny_package), "5,6,7", "--ids", "--max-tokens", "8", "--exit-threshold", "0.7", "--stats"]
    shown = CliRunner().invoke(app, order)
    assert shown.exit_code == 0, shown.output
    assert "% saved" in shown.output


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_loops": 0}, "min_loops is 0"),
        ({"min_loops": 5}, "min_loops is 5, above the 4 loops"),
        ({"exit_change": -0.1}, "exit_change is -0.1"),
        ({"exit_change": float("nan")}, "exit_change is nan"),
        ({"exit_change": float("inf")}, "exit_change is inf"),
        ({"exit_change": "x"}, "exit_change is 'x'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        LoopSettings(4, **settings)


def test_settings_for_another_number_of_sequences_are_refused(runtime: Runtime) -> None:
    driver = runtime.driver(2)
    with pytest.raises(ArgumentError, match="2 sequences, loop settings were given for 1"):
        driver.append([[5], [6]], [LoopSettings(2)])
    assert driver.lengths.tolist() == [0, 0]


def test_a_looplms_tokens_leave_by_no_rule(looplm: Runtime) -> None:
    with pytest.raises(ArgumentError, match="only 0 is possible"):
        looplm.driver().append([[5]], LoopSettings(4, exit_change=0.1))
    driver = looplm.driver(2)
    driver.append([[5], [6]], [LoopSettings(2), LoopSettings(4)])
    with pytest.raises(ArgumentError, match="tokens in the cache ran 2"):
        driver.append([[7], [8]], LoopSettings(3))
    driver.append([[], [8]], LoopSettings(4))
    assert driver.lengths.tolist() == [1, 2]


def test_depth_is_checked_again_after_a_part_has_changed_a_looplms_sequence(looplm: Runtime) -> None:
    driver, deep = looplm.driver(2), LoopSettings(4)
    driver.append([[5], [6]], deep)
    for _ in range(2):
        driver.append([[7], [8]], deep)
    part = driver.part(1, 1)
    assert part is not None
    part.clear(0)
    part.append([[6]], LoopSettings(2))
    with pytest.raises(ArgumentError, match="tokens in the cache ran 2"):
        driver.append([[7], [8]], deep)
    part.clear(0)
    part.append([[6, 8, 8]], deep)
    driver.append([[7], [8]], deep)
    assert driver.depth == [[4] * 4] * 2


def test_a_request_may_set_them(tiny_package: Path) -> None:
    runtime = Runtime.load(tiny_package)
    result = runtime.generate([5, 6, 7], max_tokens=5, loops=6, min_loops=3, exit_change=1e9, ignore_eos=True)
    assert set(result.depth) == {3}
    with pytest.raises(ArgumentError, match="min_loops is 5"):
        runtime.generate([5], loops=4, min_loops=5)


@pytest.mark.parametrize("name", ["exit_threshold", "exit_change"])
@pytest.mark.parametrize("value", [True, "0.5", float("nan"), -0.1])
def test_what_is_no_number_of_its_range_is_refused_as_a_threshold(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name} is"):
        LoopSettings(4, **{name: value})
