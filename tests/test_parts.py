"""A part of a batch is a state of its own over the same memory: same bits, no more work, no more memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage
from device_double import HostDevice, add_plans, host_library
from melt_runtime import ArgumentError, LoopDriver, LoopSettings, Package, Request, Runtime, Scheduler
from melt_runtime.backends import tensorrt
from melt_runtime.backends.tensorrt import TensorRTBackend
from test_device_state import OnStandIn

from melt_export.quantization.options import CacheOptions

SETTINGS = LoopSettings(3)
PROMPTS = [list(range(5, 18)), [20, 21, 22], list(range(23, 32)), [40, 41]]
KINDS = ["onnxruntime", "standard", "portable", "looplm", "device standard", "device portable", "engine standard"]
KINDS += ["engine portable", "int8", "int4", "looplm portable"]


@pytest.fixture(scope="module", params=KINDS)
def runtime(
    request: pytest.FixtureRequest,
    make_checkpoint: MakeCheckpoint,
    make_looplm: MakeCheckpoint,
    make_package: MakePackage,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Every backend and dialect, devices as stand-ins."""
    if request.param == "looplm":
        yield Runtime.load(make_package(make_looplm(), chunk=8))
        return
    if request.param in ("int8", "int4"):
        yield Runtime.load(make_package(make_checkpoint(), cache=CacheOptions(request.param)))
        return
    if request.param == "looplm portable":
        yield Runtime.load(make_package(make_looplm(), chunk=8, dialect="portable"))
        return
    where, dialect = request.param.split() if " " in request.param else ("cpu", request.param)
    source = make_package(make_checkpoint(), dialect=dialect)
    if where == "cpu":
        yield Runtime.load(source)
    elif where == "device":
        opened = Package.open(source)
        yield Runtime(opened, OnStandIn(opened), None)
    else:
        copy = Path(shutil.copytree(source, tmp_path_factory.mktemp("engine") / "package"))
        add_plans(copy)
        device = HostDevice()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensorrt, "open_device", lambda index: device)
            patch.setattr(tensorrt, "open_library", host_library)
            opened = Package.open(copy)
            yield Runtime(opened, TensorRTBackend(opened), None)


def rows(driver: LoopDriver, slot: int) -> list[np.ndarray]:
    """All of a sequence's caches."""
    found = []
    for state in driver.manifest.states:
        if state.kind != "swap":
            found.append(driver.state.read(state.input, (slice(None),) * (len(state.shape) - 4) + (slot,)))
    return found


def part_of(driver: LoopDriver, first: int, count: int) -> LoopDriver:
    made = driver.part(first, count)
    assert made is not None
    return made


def test_a_part_computes_what_the_whole_computes_with_the_others_idle(runtime: Runtime) -> None:
    whole, deltas = runtime.driver(4), runtime.driver(4)
    for slot in (2, 0, 3, 1):
        expected = whole.append([PROMPTS[slot] if at == slot else [] for at in range(4)], SETTINGS)
        got = part_of(deltas, slot, 1).append([PROMPTS[slot]], SETTINGS)
        assert np.array_equal(got[0], expected[slot])
    assert deltas.lengths.tolist() == [len(prompt) for prompt in PROMPTS]
    for token in range(6):  # parts of different sizes and the whole in turn, as in a batch that breathes
        for first, count in ((0, 4), (1, 2), (0, 3), (3, 1)):
            tokens = [[7 + token] if first <= slot < first + count else [] for slot in range(4)]
            expected = whole.append(tokens, SETTINGS)[first : first + count]
            assert np.array_equal(part_of(deltas, first, count).append([[7 + token]] * count, SETTINGS), expected)
    assert np.array_equal(deltas.append([[9]] * 4, SETTINGS), whole.append([[9]] * 4, SETTINGS))
    assert deltas.depth == whole.depth


def test_a_part_leaves_the_other_sequences_caches_alone(runtime: Runtime) -> None:
    driver = runtime.driver(4)
    driver.append(PROMPTS, SETTINGS)
    before = [rows(driver, slot) for slot in range(4)]
    part_of(driver, 1, 2).append([[3, 4, 5], [6]], SETTINGS)
    for slot in (0, 3):
        for mine, theirs in zip(rows(driver, slot), before[slot], strict=True):
            assert np.array_equal(mine, theirs)
    assert any(not np.array_equal(a, b) for a, b in zip(rows(driver, 1), before[1], strict=True))


def test_a_part_reads_its_own_caches_and_may_have_parts(runtime: Runtime) -> None:
    driver = runtime.driver(4)
    driver.append(PROMPTS, SETTINGS)
    inner = part_of(part_of(driver, 1, 3), 1, 1)
    for mine, theirs in zip(rows(inner, 0), rows(driver, 2), strict=True):
        assert np.array_equal(mine, theirs)
    inner.append([[8]], SETTINGS)
    assert driver.lengths.tolist() == [13, 3, 10, 2]


def test_a_part_computes_no_more_than_its_sequences(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, shapes = runtime.driver(4), []
    part = part_of(driver, 2, 1)
    real = part.state.bind  # type: ignore[attr-defined]

    def bind(graph: str, inputs: Any, outputs: Any) -> Any:
        shapes.extend(tensor.shape[0] for tensor in inputs if tensor.tensor in ("input_ids", "active", "lengths"))
        return real(graph, inputs, outputs)

    monkeypatch.setattr(part.state, "bind", bind)
    part.append([PROMPTS[0]], SETTINGS)
    assert set(shapes) == {1}


def test_slots_that_are_not_there_are_refused(runtime: Runtime) -> None:
    driver = runtime.driver(3)
    for first, count in ((-1, 1), (0, 0), (2, 2), (3, 1)):
        with pytest.raises(ArgumentError, match="not among the 3"):
            driver.part(first, count)


def test_parts_of_an_engine_take_no_device_memory(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(make_package(make_checkpoint(), dialect="standard"), tmp_path / "package"))
    add_plans(copy)
    device = HostDevice()
    monkeypatch.setattr(tensorrt, "open_device", lambda index: device)
    monkeypatch.setattr(tensorrt, "open_library", host_library)
    opened = Package.open(copy)
    driver = Runtime(opened, TensorRTBackend(opened), None).driver(4)
    made = device.made
    for slot in range(4):
        part_of(driver, slot, 1).append([[5, 6, 7]], SETTINGS)
    assert device.made == made
    monkeypatch.setattr(tensorrt, "slot_bytes", lambda manifest: {"key_cache.0": 1000})
    assert driver.part(0, 2) is None  # not where TensorRT takes an address


def test_a_scheduler_gives_on_every_backend_what_a_request_gets_alone(runtime: Runtime) -> None:
    def options(slot: int) -> dict[str, Any]:
        return {"max_tokens": 6 + 2 * slot, "loops": 1 + slot, "ignore_eos": True}

    alone = [runtime.generate(prompt, **options(slot)) for slot, prompt in enumerate(PROMPTS)]
    with Scheduler(runtime, 3) as scheduler:
        handles = [
            scheduler.submit(Request(tuple(prompt), runtime.options(**options(slot))))
            for slot, prompt in enumerate(PROMPTS)
        ]
        assert [handle.result(60) for handle in handles] == alone
