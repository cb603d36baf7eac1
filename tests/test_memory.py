"""What a session costs is known before it is made, and one that costs too much is refused with the figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import ArgumentError, BackendError, Memory, Runtime, Scheduler
from melt_runtime import machine as machine_module
from melt_runtime.backends import onnxruntime_cpu as backend_module
from melt_runtime.backends.onnxruntime_cpu import OnnxRuntimeState


@pytest.fixture(scope="module", params=["onnxruntime", "standard", "portable", "looplm"])
def runtime(
    request: pytest.FixtureRequest,
    make_checkpoint: MakeCheckpoint,
    make_looplm: MakeCheckpoint,
    make_package: MakePackage,
) -> Runtime:
    if request.param == "looplm":
        return Runtime.load(make_package(make_looplm(), chunk=8))
    return Runtime.load(make_package(make_checkpoint(), dialect=request.param))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_session_allocates_what_was_told(runtime: Runtime, batch: int) -> None:
    told, state = runtime.memory(batch=batch), runtime.driver(batch).state
    assert isinstance(state, OnnxRuntimeState)
    assert told.state_bytes == state.state_bytes == runtime.state_bytes(batch)
    assert told.session_bytes == sum(buffer.nbytes for buffer in state.buffers.values())


@pytest.mark.parametrize("length", [4, 32, 100])
def test_another_length_costs_what_a_package_of_that_length_costs(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, length: int
) -> None:
    for dialect in ("standard", "portable"):
        long, short = (
            Runtime.load(make_package(make_checkpoint(), dialect=dialect, max_seq_len=size)) for size in (200, length)
        )
        told, there = long.memory(max_seq_len=length, batch=2), short.memory(batch=2)
        assert (told.state_bytes, told.scratch_bytes) == (there.state_bytes, there.scratch_bytes)


def test_the_weights_are_those_of_the_package(runtime: Runtime) -> None:
    directory = runtime.package.directory
    files = [*directory.glob("*.onnx"), *directory.glob("*.data")]
    assert runtime.memory().weights_bytes == sum(file.stat().st_size for file in files)


def test_the_available_memory_is_the_machines(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    available = machine_module.available_memory()
    if available is not None:
        assert 1 << 20 < available < 1 << 50
    monkeypatch.setattr(backend_module, "available_memory", lambda: 12345)
    assert runtime.memory().available_bytes == 12345
    assert not runtime.memory().fits
    assert Memory(1, 2, 3, None).fits


def test_a_machine_that_does_not_tell_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "Path", lambda name: tmp_path / "missing")
    assert machine_module.available_memory() is None
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:  7 kB\n")
    monkeypatch.setattr(machine_module, "Path", lambda name: tmp_path / "meminfo")
    assert machine_module.available_memory() == 7 * 1024


def test_what_needs_more_than_there_is_is_refused_with_the_figures(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = runtime.memory()
    monkeypatch.setattr(backend_module, "available_memory", lambda: told.session_bytes - 1)
    figures = (
        f"needs {told.session_bytes:,} bytes of memory .{told.state_bytes:,} of state.*{told.session_bytes - 1:,} are"
    )
    for open_one in (runtime.driver, runtime.session, lambda: Scheduler(runtime, 1)):
        with pytest.raises(BackendError, match=figures):
            open_one()
    monkeypatch.setattr(backend_module, "available_memory", lambda: told.session_bytes)
    runtime.session()
    with pytest.raises(BackendError, match="a batch of 2 needs"):
        runtime.driver(2)


def test_a_batch_or_length_below_one_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ArgumentError, match="batch is 0"):
        runtime.memory(batch=0)
    with pytest.raises(ArgumentError, match="max_seq_len is -1"):
        runtime.memory(max_seq_len=-1)
