"""A token repeats the runs of the one before it, unless it differs from that in more than numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import LoopSettings, Runtime
from melt_runtime.backends import onnxruntime_cpu
from melt_runtime.backends.buffers import BufferState
from melt_runtime.backends.onnxruntime_cpu import OnnxRuntimeState
from melt_runtime.decoding.loop_driver import LoopDriver

STEPS = 60


@pytest.fixture(params=["melt", "looplm", "standard"])
def runtime(
    request: pytest.FixtureRequest,
    make_looplm: MakeCheckpoint,
    make_package: MakePackage,
    tiny_checkpoint: Path,
) -> Runtime:
    if request.param == "looplm":
        package = make_package(make_looplm())
    else:
        package = make_package(tiny_checkpoint, dialect="standard" if request.param == "standard" else "onnxruntime")
    return Runtime.load(package, check_hashes=False)


def steps(driver: LoopDriver, loops: int, seed: int) -> list[np.ndarray]:
    """Run tokens one by one and in chunks, all sequences and some, shallow and deep; return the logits."""
    random, found = np.random.default_rng(seed), []
    for _ in range(STEPS):
        wide, idle = random.random() < 0.15, random.random() < 0.15
        tokens = [random.integers(1, 50, 4 if wide else 1).tolist() for _ in range(driver.batch)]
        if idle:
            tokens[random.integers(driver.batch)] = []
        depth = int(random.integers(1, loops + 1)) if loops > 1 and random.random() < 0.2 else loops
        if any(driver.room(slot) < 4 for slot in range(driver.batch)):
            driver.reset()
        found.append(driver.append(tokens, LoopSettings(depth, exit_threshold=1.0)))
        if random.random() < 0.1:
            driver.truncate(0, int(driver.lengths[0]) // 2)
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_repeated_runs_compute_what_looking_everything_up_does(
    runtime: Runtime, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = 1 if runtime.manifest.cache_loops else runtime.manifest.loops
    repeated = steps(runtime.driver(batch), loops, seed=batch)
    monkeypatch.setattr(OnnxRuntimeState, "run_chunk", BufferState.run_chunk)
    plain = steps(runtime.driver(batch), loops, seed=batch)
    assert all((one == other).all() for one, other in zip(repeated, plain, strict=True))


def test_parts_of_a_batch_keep_runs_of_their_own(runtime: Runtime) -> None:
    loops = LoopSettings(runtime.manifest.loops)
    whole, alone = runtime.driver(2), runtime.driver(1)
    whole.append([[5, 6], [7, 8]], loops)
    alone.append([[7, 8]], loops)
    part = whole.part(1, 1)
    assert part is not None
    for token in (9, 10, 11):
        both = whole.append([[token], [token]], loops)[1]
        assert (both == alone.append([[token]], loops)[0]).all()
        assert (part.append([[token]], loops)[0] == alone.append([[token]], loops)[0]).all()


def test_no_run_is_kept_of_a_token_that_failed(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, loops = runtime.driver(), LoopSettings(runtime.manifest.loops)
    driver.append([[5, 6]], loops)
    real = onnxruntime_cpu.run_bound

    def failing(session: object, graph: str, binding: object) -> None:
        if graph == "lm_head":
            raise MemoryError
        real(session, graph, binding)

    monkeypatch.setattr(onnxruntime_cpu, "run_bound", failing)
    with pytest.raises(MemoryError):
        driver.append([[7]], loops)
    monkeypatch.setattr(onnxruntime_cpu, "run_bound", real)
    other = runtime.driver()
    other.append([[5, 6]], loops)
    for token in (7, 8, 9):
        assert (driver.append([[token]], loops) == other.append([[token]], loops)).all()
