"""Beginnings of prompts that were run before are put back: same results, less work, bounded memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_parts
from conftest import MakeCheckpoint, MakePackage
from device_double import HostDevice, add_plans, host_library
from melt_runtime import (
    ArgumentError,
    BackendError,
    LoopDriver,
    LoopSettings,
    Package,
    PrefixCache,
    Request,
    Runtime,
    Scheduler,
)
from melt_runtime.backends import tensorrt
from melt_runtime.backends.tensorrt import TensorRTBackend
from test_device_state import OnStandIn

every_backend = test_parts.runtime
SETTINGS = LoopSettings(3)
SYSTEM = list(range(3, 22))  # two chunks of 8 and three tokens
PLENTY = 1 << 24


@pytest.fixture(scope="module")
def runtime(tiny_package: Path) -> Runtime:
    return Runtime.load(tiny_package)


def run(store: PrefixCache, runtime: Runtime, prompt: list[int], settings: LoopSettings = SETTINGS) -> Any:
    """Runs a prompt as who uses a store does. Returns how many tokens were known, the logits and the driver."""
    driver = runtime.driver()
    known = store.restore(driver, 0, prompt, settings)
    assert int(driver.lengths[0]) == len(driver.depth[0]) == known
    logits = driver.append([prompt[known:]], settings)[0]
    store.keep(driver, 0, prompt, settings)
    return known, logits, driver


@pytest.mark.parametrize("settings", [SETTINGS, LoopSettings(4, chunk=5)])
def test_logits_behind_a_known_beginning_are_those_of_the_whole_prompt(
    every_backend: Runtime, settings: LoopSettings
) -> None:
    store = PrefixCache(PLENTY)
    run(store, every_backend, [*SYSTEM, 30, 31], settings)
    prompt = [*SYSTEM, 40, 41, 42, 43, 44, 45, 46]
    known, logits, driver = run(store, every_backend, prompt, settings)
    assert known == (16 if settings.chunk is None else 15)
    whole = every_backend.driver()
    assert np.array_equal(logits, whole.append([prompt], settings)[0])
    assert driver.depth == whole.depth
    for token in (7, 8, 9):
        assert np.array_equal(driver.append([[token]], settings), whole.append([[token]], settings))


def test_tokens_that_left_early_come_back_with_their_depth(runtime: Runtime) -> None:
    settings, store = LoopSettings(4, exit_threshold=0.8), PrefixCache(PLENTY)
    run(store, runtime, SYSTEM, settings)
    known, logits, driver = run(store, runtime, SYSTEM, settings)
    whole = runtime.driver()
    assert known == 16
    assert np.array_equal(logits, whole.append([SYSTEM], settings)[0])
    assert driver.depth == whole.depth
    assert len(set(driver.depth[0][:16])) > 1


@pytest.mark.parametrize(
    ("prompt", "known"),
    [
        (SYSTEM, 16),
        ([*SYSTEM[:16], 40], 16),
        (SYSTEM[:16], 8),  # its last token must run, and so its last chunk
        ([*SYSTEM[:12], 40, 41, 42, 43, 44, 45, 46], 8),
        (SYSTEM[:8], 0),
        ([40, *SYSTEM], 0),
        ([4], 0),
    ],
)
def test_whole_chunks_that_are_equal_are_known(runtime: Runtime, prompt: list[int], known: int) -> None:
    store = PrefixCache(PLENTY)
    run(store, runtime, SYSTEM)
    assert run(store, runtime, prompt)[0] == known


@pytest.mark.parametrize(
    "settings", [LoopSettings(4), LoopSettings(3, 0.8), LoopSettings(3, chunk=4), LoopSettings(3, 0.9, None, 2)]
)
def test_other_loop_settings_know_nothing(runtime: Runtime, settings: LoopSettings) -> None:
    store = PrefixCache(PLENTY)
    run(store, runtime, SYSTEM)
    assert run(store, runtime, SYSTEM, settings)[0] == 0
    assert run(store, runtime, SYSTEM, LoopSettings(3, chunk=8))[0] == 16  # the package's chunk by its number


def refused(store: PrefixCache, other: Runtime) -> None:
    """Whoever would use a store with another runtime is told so, and nothing in it changes."""
    before = (len(store), store.bytes)
    for use in (
        lambda: run(store, other, SYSTEM),
        lambda: other.session(prefixes=store),
        lambda: Scheduler(other, 1, prefixes=store),
        lambda: store.keep(other.driver(), 0, SYSTEM, SETTINGS),
    ):
        with pytest.raises(ArgumentError, match=r"^the prefix cache holds positions of another package, "):
            use()
    assert (len(store), store.bytes) == before


def test_another_package_is_refused(
    runtime: Runtime, make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    store = PrefixCache(PLENTY)
    run(store, runtime, SYSTEM)
    other = Runtime.load(make_package(make_checkpoint(initializer_range=0.2)))
    refused(store, other)
    assert run(store, Runtime.load(runtime.package.directory), SYSTEM)[0] == 16
    store.clear()
    assert [run(store, other, SYSTEM)[0] for _ in range(2)] == [0, 16]


def test_another_backend_of_the_same_package_is_refused(tiny_package: Path, runtime: Runtime) -> None:
    package, store = Package.open(tiny_package), PrefixCache(PLENTY)
    runtime.session(prefixes=store)
    refused(store, Runtime(package, OnStandIn(package), None))


def test_another_engine_of_the_same_package_is_refused(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(shutil.copytree(make_package(make_checkpoint(), dialect="standard"), tmp_path / "package"))
    add_plans(directory, "one")
    add_plans(directory, "other", candidates=5)
    device = HostDevice()
    monkeypatch.setattr(tensorrt, "open_device", lambda index: device)
    monkeypatch.setattr(tensorrt, "open_library", host_library)
    package = Package.open(directory)
    one, again, other = (Runtime(package, TensorRTBackend(package, name), None) for name in ("one", "one", "other"))
    store = PrefixCache(PLENTY)
    run(store, one, SYSTEM)
    assert run(store, again, SYSTEM)[0] == 16
    refused(store, other)


def test_equal_beginnings_are_kept_once(runtime: Runtime) -> None:
    store = PrefixCache(PLENTY)
    run(store, runtime, SYSTEM)
    before = store.bytes
    assert (len(store), before) == (2, runtime.manifest.cache_bytes(16))
    run(store, runtime, [*SYSTEM[:16], 33])
    assert store.bytes == before
    run(store, runtime, [*SYSTEM[:8], *range(40, 48)])
    assert (len(store), store.bytes) == (3, runtime.manifest.cache_bytes(24))
    store.clear()
    assert (len(store), store.bytes, run(store, runtime, SYSTEM)[0]) == (0, 0, 0)


def test_a_looplm_keeps_the_caches_of_the_loops_that_ran(
    make_looplm: MakeCheckpoint, make_package: MakePackage
) -> None:
    runtime, store = Runtime.load(make_package(make_looplm(), chunk=8)), PrefixCache(PLENTY)
    run(store, runtime, SYSTEM, LoopSettings(2))
    assert store.bytes == runtime.manifest.cache_bytes(16) // 2


# Bounds


def prompt_of(first: int) -> list[int]:
    """Three chunks that begin unlike all others."""
    return [first, *range(10, 33)]


def chunks(runtime: Runtime, count: int) -> int:
    return runtime.manifest.cache_bytes(8 * count)


def test_the_store_never_holds_more_than_it_may(runtime: Runtime) -> None:
    store, rng = PrefixCache(chunks(runtime, 5) + 7), np.random.default_rng(0)
    for _ in range(40):
        prompt = np.repeat(rng.integers(3, 6, 5), 8).tolist()[: int(rng.integers(8, 41))]
        _, logits, _ = run(store, runtime, prompt)
        assert store.bytes <= store.max_bytes
        assert store.bytes == chunks(runtime, len(store))
        assert np.array_equal(logits, runtime.driver().append([prompt], SETTINGS)[0])


def test_what_was_not_used_for_longest_goes_first(runtime: Runtime) -> None:
    store = PrefixCache(chunks(runtime, 6))
    run(store, runtime, prompt_of(3))
    run(store, runtime, prompt_of(4))
    assert run(store, runtime, [*prompt_of(3), 9])[0] == 24
    run(store, runtime, prompt_of(5))
    known = [store.restore(runtime.driver(), 0, [*prompt_of(first), 9], SETTINGS) for first in (3, 4, 5)]
    assert known == [24, 0, 24]


def test_ends_of_prompts_go_before_their_beginnings(runtime: Runtime) -> None:
    store = PrefixCache(chunks(runtime, 4))
    run(store, runtime, prompt_of(3))
    run(store, runtime, prompt_of(4)[:16])
    known = [store.restore(runtime.driver(), 0, [*prompt_of(first), 9], SETTINGS) for first in (3, 4)]
    assert known == [16, 16]


def test_a_prompt_that_is_larger_than_the_store_leaves_its_beginning(runtime: Runtime) -> None:
    store = PrefixCache(chunks(runtime, 2))
    run(store, runtime, prompt_of(3))
    assert store.restore(runtime.driver(), 0, [*prompt_of(3), 9], SETTINGS) == 16
    small = PrefixCache(chunks(runtime, 1) - 1)
    run(small, runtime, prompt_of(3))
    assert (len(small), small.bytes) == (0, 0)


def test_a_store_needs_room(runtime: Runtime) -> None:
    with pytest.raises(ArgumentError, match="max_bytes is 0"):
        PrefixCache(0)


# Who uses it


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of a driver ran."""
    ran, advance = list[int](), LoopDriver.advance
    patch.setattr(
        LoopDriver,
        "advance",
        lambda self, tokens, settings, **how: (
            ran.append(sum(map(len, tokens))) or advance(self, tokens, settings, **how)
        ),
    )
    return ran


def test_a_session_does_not_run_what_another_has_run(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PrefixCache(PLENTY)
    plain, first, second = runtime.session(), runtime.session(prefixes=store), runtime.session(prefixes=store)
    prompt = [*SYSTEM, 40, 41]
    plain.append(prompt)
    first.append(SYSTEM)
    ran = counted(monkeypatch)
    second.append(prompt)
    assert ran == [5]
    assert (second.tokens, second.depth, second.chunks) == (plain.tokens, plain.depth, plain.chunks)
    assert np.array_equal(second.logits(), plain.logits())
    second.append(SYSTEM)  # a later turn is cut elsewhere and runs whole
    plain.append(SYSTEM)
    assert np.array_equal(second.logits(), plain.logits())
    assert ran == [5, 19, 19]


def test_a_session_that_cannot_have_the_rows_back_is_empty(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PrefixCache(PLENTY)
    runtime.session(prefixes=store).append(SYSTEM)
    session, left = runtime.session(prefixes=store), [1]
    write = session.driver.state.write_positions

    def fails(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise BackendError("it broke")
        write(*arguments)

    monkeypatch.setattr(session.driver.state, "write_positions", fails)
    with pytest.raises(BackendError, match="it broke"):
        session.append(SYSTEM)
    assert session.tokens == tuple(SYSTEM[:8])  # the chunk that came back
    session.append(SYSTEM[8:])
    expected = runtime.session()
    expected.append(SYSTEM)
    assert np.array_equal(session.logits(), expected.logits())


def test_a_scheduler_gives_with_a_store_what_it_gives_without(every_backend: Runtime) -> None:
    work: list[tuple[list[int], dict[str, Any]]] = [
        ([*SYSTEM, 30 + at, 31], {"max_tokens": 4 + at, "loops": 2 + at % 2, "ignore_eos": True}) for at in range(6)
    ]
    alone = [every_backend.generate(prompt, **options) for prompt, options in work]
    store = PrefixCache(PLENTY)
    with Scheduler(every_backend, 3, prefixes=store) as scheduler:
        for _ in range(2):
            handles = [scheduler.submit(Request(tuple(p), every_backend.options(**options))) for p, options in work]
            assert [handle.result(60) for handle in handles] == alone
        total = 2 * sum(len(prompt) for prompt, _ in work)
        assert scheduler.metrics().prompt_tokens <= total - 6 * 16
    assert len(store) == 4
