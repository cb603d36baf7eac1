"""Busy processes beside a measurement: there while it runs, and gone with it however it ends."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from melt_runtime import ArgumentError, BackendError
from melt_runtime.bench import busy as busy_module
from melt_runtime.bench import stopwatch
from melt_runtime.bench import sweep as sweep_module
from melt_runtime.bench.busy import BusyProcesses
from melt_runtime.bench.stopwatch import Stopwatch
from melt_runtime.bench.sweep import Sweep, bench
from melt_runtime.cli.main import app
from processes import started
from typer.testing import CliRunner

LIMIT = 60.0  # seconds for what takes a moment
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads other processes in /proc")
BENCH = "from melt_runtime.cli.main import main; main()"


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads a megabyte instead of what real figures need, and starts no process to measure memory."""
    monkeypatch.setattr(sweep_module.ReadBandwidth.__init__, "__defaults__", (1 << 20,))
    monkeypatch.setattr(stopwatch, "_SETTLING", 0.0)
    monkeypatch.setattr(sweep_module, "peak_memory", lambda *_: {"loaded_bytes": None, "peak_bytes": None})


def status(process: int) -> tuple[str, int] | None:
    """A process's state and its parent; None where there is none."""
    try:
        _, _, rest = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")
    except OSError:
        return None
    state, parent = rest.split()[:2]
    return state, int(parent)


def alive(process: int) -> bool:
    found = status(process)
    return found is not None and found[0] not in "ZX"


def busy_children(parent: int) -> list[int]:
    """The busy processes that a process has started."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        known = status(int(directory.name))
        try:
            if known is not None and known[1] == parent and b"while True" in (directory / "cmdline").read_bytes():
                found.append(int(directory.name))
        except OSError:
            continue
    return found


def wait_until(holds: Callable[[], Any]) -> Any:
    """What ``holds`` gives as soon as it is true. Fails after a minute."""
    end = time.monotonic() + LIMIT
    while not (found := holds()):
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.05)
    return found


@needs_proc
def test_busy_processes_run_until_the_block_ends() -> None:
    with BusyProcesses(2) as busy:
        running = [process.pid for process in busy.processes]
        assert len(set(running)) == 2
        assert all(map(alive, running))
    assert not any(map(alive, running))


@needs_proc
def test_busy_processes_end_with_a_block_that_fails() -> None:
    running: list[int] = []

    def fail() -> None:
        with BusyProcesses(1) as busy:
            running.extend(process.pid for process in busy.processes)
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        fail()
    assert len(running) == 1
    assert not any(map(alive, running))


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_busy_processes_end_with_a_bench_that_is_ended(tiny_package: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", BENCH, "bench", tiny_package, "--busy", "2", "--rounds", "1000000"]
    with started([*command, "--prompt", "8", "--threads", "1"]) as process:
        running = wait_until(lambda: len(found := busy_children(process.pid)) == 2 and found)
        assert all(map(alive, running))
        process.send_signal(number)
        process.wait(LIMIT)
        wait_until(lambda: not any(map(alive, running)))


def test_a_sweep_over_busy_processes_measures_beside_each_number_in_turn(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, seen = list[int](), list[int]()
    enter, leave, decode = BusyProcesses.__enter__, BusyProcesses.__exit__, Stopwatch.decode

    def entered(self: BusyProcesses) -> BusyProcesses:
        made = enter(self)
        running.append(len(self.processes))
        return made

    def left(self: BusyProcesses, *error: Any) -> None:
        running.pop()
        leave(self, *error)

    def noted(self: Stopwatch, context: int, loops: int, tokens: int) -> tuple[float, float]:
        seen.append(running[-1])
        return decode(self, context, loops, tokens)

    monkeypatch.setattr(BusyProcesses, "__enter__", entered)
    monkeypatch.setattr(BusyProcesses, "__exit__", left)
    monkeypatch.setattr(Stopwatch, "decode", noted)
    file = tmp_path / "bench.json"
    options = ["--busy", "0,1", "--prompt", "8", "--tokens", "1", "--rounds", "1", "--threads", "1"]
    result = CliRunner().invoke(app, ["bench", str(tiny_package), *options, "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert [busy for busy, _ in groupby(seen)] == [0, 1] * 2  # a round, and one before that does not count
    report = json.loads(file.read_text(encoding="utf-8"))
    assert [row["busy"] for row in report["results"]] == [0, 1]
    assert [found["busy"] for found in report["bandwidth"]] == [0, 1]
    assert report["results"][0]["time_against_quiet"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert report["results"][1]["time_against_quiet"]["median"] > 0
    assert "against quiet" in result.output
    assert "beside 1 busy process\n" in result.output


def test_a_table_says_what_computed_beside_and_nothing_where_nothing_did(tiny_package: Path) -> None:
    options = ["--prompt", "8", "--tokens", "1", "--rounds", "1", "--threads", "1"]
    beside = CliRunner().invoke(app, ["bench", str(tiny_package), *options, "--busy", "2"])
    alone = CliRunner().invoke(app, ["bench", str(tiny_package), *options])
    assert "measured beside 2 busy processes" in beside.output
    assert "against quiet" not in beside.output
    assert "busy" not in alone.output


def test_without_a_quiet_run_there_is_no_time_against_one(tiny_package: Path) -> None:
    report = bench([tiny_package], Sweep(prompt=0, tokens=1, rounds=1, threads=(1,), busy=(1,)))
    assert [row["time_against_quiet"] for row in report["results"]] == [None]


@pytest.mark.parametrize("text", ["65", "9" * 30])
def test_more_busy_processes_than_64_are_refused_in_one_line(tiny_package: Path, text: str) -> None:
    result = CliRunner().invoke(app, ["bench", str(tiny_package), "--busy", text])
    assert result.exit_code == 2
    assert "from 0 to 64" in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("count", [-1, True, 1.0, "1", None])
def test_a_number_of_busy_processes_is_a_whole_number(count: Any) -> None:
    with pytest.raises(ArgumentError, match="from 0 to 64"):
        BusyProcesses(count)


def test_a_busy_process_that_cannot_start_is_an_error_with_the_program_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("/nowhere/python", "/bin/false"):
        monkeypatch.setattr(busy_module.sys, "executable", missing)
        with pytest.raises(BackendError, match=missing), BusyProcesses(1):
            pass
