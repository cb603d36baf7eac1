"""Threads on the CPU: as many as there are cores that other processes leave free. Nothing here depends on time."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from melt_runtime import LoopSettings, Runtime
from melt_runtime.backends import cpu_threads, onnxruntime_cpu
from melt_runtime.backends.cpu_threads import Choice, OtherProcesses, ThreadLimit, fitting_threads
from melt_runtime.package.specs import GraphSpec, TensorSpec
from processes import LIMIT

ROW = "cpu{name} {user} 0 0 {idle} 0 0 0 {stolen} 0 0\n"


@pytest.fixture
def runtime(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """On three cores, whatever the machine has."""
    monkeypatch.setattr(onnxruntime_cpu, "physical_cores", lambda: 3)
    yield Runtime.load(tiny_package, check_hashes=False)
    gc.collect()


def limit_of(runtime: Runtime) -> ThreadLimit:
    found: ThreadLimit = runtime.backend.thread_limit  # type: ignore[attr-defined]
    return found


def others_use(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, cores: float, faster: int = 1) -> None:
    """Look at other processes that use so many of three cores, beside which ``faster`` threads decode fastest."""
    limit = limit_of(runtime)
    monkeypatch.setattr(limit._others, "allowed", 3)
    monkeypatch.setattr(limit._others, "cores", lambda: cores)
    limit._next = time.perf_counter()
    limit.before(1)
    for _ in range(20):  # until the trial is over
        limit.decoded(1.0 + abs(limit.threads - faster))
        limit.before(1)


def held(runtime: Runtime) -> list[int]:
    """How many threads of each graph's session are held."""
    return [workers.held for workers in limit_of(runtime)._workers]


def worked() -> dict[str, int]:
    """Nanoseconds that each thread of this process has run."""
    tasks = Path("/proc/self/task").iterdir()
    return {task.name: int((task / "schedstat").read_text(encoding="ascii").split()[0]) for task in tasks}


# How many


@pytest.mark.parametrize(
    ("free", "now", "expected"),
    [
        (2.0, 2, 2),
        (1.6, 2, 2),  # others use less than half a core
        (1.4, 2, 1),
        (1.0, 2, 1),
        (1.0, 1, 1),
        (1.6, 1, 1),  # not yet enough to come back
        (1.8, 1, 2),
        (0.2, 2, 1),  # never fewer than one
        (0.0, 1, 1),
        (16.0, 2, 2),  # never more than there are
        (5.3, 8, 5),
        (7.9, 5, 8),
    ],
)
def test_a_thread_goes_where_half_its_core_is_used_and_comes_back_where_a_quarter_is(
    free: float, now: int, expected: int
) -> None:
    most = 8 if max(now, expected) > 2 else 2
    assert fitting_threads(free, now, most) == expected


def test_other_processes_are_what_the_cores_worked_but_for_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, clock, own = tmp_path / "stat", [0.0], [0.0]
    monkeypatch.setattr(cpu_threads.os, "sched_getaffinity", lambda _: {0, 2})
    monkeypatch.setattr(cpu_threads.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(cpu_threads.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(cpu_threads.time, "process_time", lambda: own[0])

    def write(*cores: tuple[int, int]) -> None:
        rows = (ROW.format(name=at, user=user, idle=999, stolen=stolen) for at, (user, stolen) in enumerate(cores))
        stat.write_text("cpu  9 9 9 9 9 9 9 9 9 9\n" + "".join(rows) + "intr 1\n", encoding="ascii")

    write((100, 0), (100, 0), (100, 0))
    others = OtherProcesses(stat)
    assert (others.known, others.allowed) == (True, 2)
    write((300, 0), (900, 900), (150, 50))  # the second core is not ours; 2 s and 1 s of two seconds on ours
    clock[0], own[0] = 2.0, 1.0
    assert others.cores() == pytest.approx(1.0)
    clock[0], own[0] = 3.0, 1.5  # counted in larger steps than ours
    assert others.cores() == 0.0


@pytest.mark.parametrize("text", [None, "", "cpu 1 2 3\n", "cpu0 a b c\n"])
def test_where_the_system_does_not_tell_nobody_else_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_package: Path, text: str | None
) -> None:
    stat = tmp_path / "stat"
    if text is not None:
        stat.write_text(text, encoding="ascii")
    monkeypatch.setattr(OtherProcesses.__init__, "__defaults__", (stat,))
    monkeypatch.setattr(onnxruntime_cpu, "physical_cores", lambda: 2)
    others = OtherProcesses()
    assert (others.known, others.cores()) == (False, 0.0)
    runtime = Runtime.load(tiny_package, check_hashes=False)
    runtime.generate([0], max_tokens=2)
    assert held(runtime) == [0, 0, 0]


# Which


def test_threads_are_held_and_come_back_as_other_processes_come_and_go(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cores, expected in ((0.0, 0), (1.0, 1), (0.4, 1), (3.0, 2), (1.0, 1), (0.1, 0)):
        others_use(runtime, monkeypatch, cores)
        assert held(runtime) == [expected] * 3
        assert limit_of(runtime).threads == 3 - expected


def test_no_thread_is_held_where_all_of_them_are_faster(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    others_use(runtime, monkeypatch, 1.0, faster=3)
    assert held(runtime) == [0, 0, 0]


def test_a_prompt_has_all_threads(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    others_use(runtime, monkeypatch, 1.0)
    limit_of(runtime).before(8)
    assert held(runtime) == [0, 0, 0]
    limit_of(runtime).before(1)
    assert held(runtime) == [1, 1, 1]


def test_where_no_thread_can_be_held_all_of_them_compute(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("this build has no such threads")

    for workers in limit_of(runtime)._workers:
        monkeypatch.setattr(workers, "_session", type("Session", (), {"run_async": refuse})())
    others_use(runtime, monkeypatch, 1.0)
    runtime.generate([0], max_tokens=2)
    assert held(runtime) == [0, 0, 0]
    assert limit_of(runtime).threads == 3


def test_a_look_that_comes_late_only_begins_to_look(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran while nobody asked for tokens may have ended long ago."""
    monkeypatch.setattr(limit_of(runtime)._others, "cores", lambda: 3.0)
    limit_of(runtime)._next = time.perf_counter() - 60
    limit_of(runtime).before(1)
    assert held(runtime) == [0, 0, 0]


def test_every_run_may_look_and_only_decoding_is_timed(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, timed = list[float](), list[float]()
    monkeypatch.setattr(limit_of(runtime)._others, "cores", lambda: looks.append(0.0) or float(limit_of(runtime).most))
    monkeypatch.setattr(limit_of(runtime), "decoded", timed.append)
    monkeypatch.setattr(cpu_threads, "_INTERVAL", 1e9)
    limit_of(runtime)._next = limit_of(runtime).quiet_until = time.perf_counter()
    runtime.generate([0, 1, 2], max_tokens=3, ignore_eos=True, loops=2)
    assert len(looks) == 1  # a second one is not due
    assert limit_of(runtime).quiet_until == 0.0  # others use the cores: numbers of threads are tried
    assert len(timed) == 2 * 2  # two tokens after the prompt's, of two loops
    assert min(timed) > 0


def test_alone_no_run_asks_before_the_next_look(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, asked = limit_of(runtime), list[int]()
    monkeypatch.setattr(limit._others, "cores", lambda: limit._others.allowed - float(limit.most))  # none is missing
    limit._next = limit.quiet_until = time.perf_counter()
    runtime.generate([0, 1, 2], max_tokens=1, ignore_eos=True)
    assert limit.quiet_until == limit._next > time.perf_counter() - 1
    limit.quiet_until = float("inf")
    monkeypatch.setattr(limit, "before", asked.append)
    runtime.generate([0, 1, 2], max_tokens=3, ignore_eos=True)
    assert not asked


def test_both_numbers_of_threads_are_tried_in_turn_and_the_faster_one_is_kept() -> None:
    choice = Choice(2)

    def trial(seconds: dict[int, float]) -> list[int]:
        used = []
        for step in range(40):
            used.append(choice.threads)
            choice.ran(seconds[choice.threads] * (1 + step / 10))  # the context grows
        return used

    choice.update(2)
    assert set(trial({1: 1.0, 2: 2.0})) == {2}  # alone nothing is tried
    choice.update(1)
    assert trial({1: 2.0, 2: 2.6}) == [1, 2] * 6 + [1] * 28
    for _ in range(9):
        choice.update(1)
        assert set(trial({1: 9.0, 2: 2.0})) == {1}  # it was chosen
    choice.update(1)
    assert trial({1: 2.6, 2: 2.0}) == [1, 2] * 6 + [2] * 28
    for _ in range(10):
        choice.update(1)
    assert trial({1: 2.0, 2: 1.96})[-1] == 1  # hardly faster
    choice.update(2)
    assert choice.threads == 2


def test_a_number_that_stays_the_faster_one_is_tried_more_and_more_rarely() -> None:
    choice, pauses, looks = Choice(2), list[int](), 0
    while len(pauses) < 7:
        choice.update(1)
        looks += 1
        if not choice.settled and choice.threads == 1 and choice._turns_left:
            pauses.append(looks)
            looks = 0
            for _ in range(12):
                choice.ran({1: 1.0, 2: 2.0}[choice.threads])
    assert pauses == [1, 10, 20, 40, 80, 160, 160]
    choice.update(2)
    choice.update(1)
    assert choice._turns_left  # others came: both are tried at once


def test_held_threads_change_no_value(runtime: Runtime, tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, alone = runtime.driver(), Runtime.load(tiny_package, threads=1).driver()
    tokens = [[1, 2, 3, 4, 5]]
    settings = LoopSettings(4)
    for cores in (0.0, 1.0, 0.0):
        others_use(runtime, monkeypatch, cores)
        driver.reset()
        alone.reset()
        expected = alone.append(tokens, settings)
        np.testing.assert_allclose(driver.append(tokens, settings), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts what threads have run in /proc")
def test_a_held_thread_does_not_run_and_a_released_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    side, own, wait = 768, list[str](), cpu_threads._Hold.wait
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", side]) for name in "xy")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    weight = onnx.numpy_helper.from_array(np.ones((side, side), np.float32), "w")
    graph = onnx.helper.make_graph([node], "product", [x], [y], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    spec = [TensorSpec(name, "float32", ("rows", side)) for name in "xy"]
    workers = cpu_threads.Workers(session, GraphSpec("product.onnx", (spec[0],), (spec[1],)))

    def noted(*given: Any) -> None:
        own.append(str(threading.get_native_id()))
        wait(*given)

    def ran() -> bool:
        early = worked()[own[0]]
        for _ in range(20):
            session.run(None, {"x": np.ones((128, side), np.float32)})
        return worked()[own[0]] != early

    def until(holds: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.01)

    monkeypatch.setattr(cpu_threads._Hold, "wait", staticmethod(noted))
    workers.hold(1)
    until(lambda: bool(own))
    until(lambda: not ran())  # it waits now
    assert not ran()
    workers.hold(0)
    until(ran)
    until(lambda: not workers.away())


def test_threads_spin_for_a_moment_and_never_between_runs(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options that reach ONNX Runtime's sessions."""
    seen = []
    load = onnxruntime_cpu.OnnxRuntimeBackend.load

    def noted(self: Any, graph: str, options: Any, providers: Any) -> Any:
        names = ("session.intra_op.spin_duration_us", "session.force_spinning_stop")
        seen.append((options.intra_op_num_threads, *map(options.get_session_config_entry, names)))
        return load(self, graph, options, providers)

    monkeypatch.setattr(onnxruntime_cpu, "physical_cores", lambda: 3)
    monkeypatch.setattr(onnxruntime_cpu.OnnxRuntimeBackend, "load", noted)
    for threads, expected in ((None, 3), (2, 2)):
        Runtime.load(tiny_package, threads=threads, check_hashes=False)
        assert seen == [(expected, "15", "1")] * 3
        seen.clear()


def test_a_number_of_threads_that_is_asked_for_stays(tiny_package: Path) -> None:
    assert Runtime.load(tiny_package, threads=2).backend.thread_limit is None  # type: ignore[attr-defined]


# The end

PROGRAM = """
import gc, sys, time
from melt_runtime import Runtime
from melt_runtime.backends import onnxruntime_cpu

onnxruntime_cpu.physical_cores = lambda: 3
runtime = Runtime.load(sys.argv[1], check_hashes=False)
limit = runtime.backend.thread_limit
limit._next = float("inf")
limit._choice.threads, limit.quiet_until = 1, 0.0
runtime.generate([0], max_tokens=3)
assert limit._running == 1
del limit
if sys.argv[2] == "cycle":
    ring = [runtime]
    ring.append(ring)
    del ring
if sys.argv[2] != "exit":
    del runtime
    gc.collect()
print("end", flush=True)
"""


@pytest.mark.parametrize("how", ["exit", "deleted", "cycle"])
def test_a_runtime_and_a_process_end_while_threads_are_held(tiny_package: Path, how: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tiny_package), how]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "end\n", "")


def test_a_runtime_that_ends_on_a_held_thread_does_not_wait_for_itself(runtime: Runtime) -> None:
    """The garbage collector may come by wherever Python runs."""
    limit = limit_of(runtime)
    ended: list[Any] = []

    def ends(_results: Any, hold: Any, _error: str) -> None:
        hold.thread = cpu_threads.get_ident()
        ended.append(limit._end())
        hold.gate.acquire()

    workers = limit._workers[0]
    hold = cpu_threads._Hold()
    workers._held.append(hold)
    workers._session.run_async([workers._output], workers._nothing, ends, hold)
    end = time.monotonic() + LIMIT
    while not ended or any(workers.away() for workers in limit._workers):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert held(runtime) == [0, 0, 0]
