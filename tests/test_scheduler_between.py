"""Between two loops the scheduler looks who still wants a token: a deep request holds nobody for longer than a loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import ArgumentError, CancelledError, DeadlineError, PackageError, Runtime, Scheduler
from melt_runtime.backends.onnxruntime_cpu import OnnxRuntimeState
from melt_runtime.package.reader import Package
from melt_runtime.package.specs import MAX_LOOPS
from melt_runtime.scheduler import scheduler as scheduler_module
from serving import eventually
from test_package import edit
from test_scheduler import WAIT, request


@pytest.fixture(scope="module")
def runtime(tiny_package: Path) -> Runtime:
    return Runtime.load(tiny_package)


class Loops:
    """Counts the loops that a backend runs, and calls ``act`` after a certain one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ran, self.at = 0, -1
        self.act: Callable[[], Any] = lambda: None
        run = OnnxRuntimeState.run

        def counted(state: OnnxRuntimeState, graph: str, bound: Any) -> None:
            run(state, graph, bound)
            if graph == "loop_step":
                self.ran += 1
                if self.ran == self.at:
                    self.act()

        patch.setattr(OnnxRuntimeState, "run", counted)
        patch.setattr(scheduler_module, "_SWEEP_SECONDS", 0.0)


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loops]:
    return Loops(monkeypatch)  # type: ignore[return-value]


@pytest.mark.parametrize("depth", [16, MAX_LOOPS], ids=["in one go", "one by one"])
@pytest.mark.parametrize("prompt", [[5], list(range(3, 11))], ids=["token", "chunk"])
def test_a_request_that_is_cancelled_in_its_loops_ends_there(
    runtime: Runtime, loops: Loops, prompt: list[int], depth: int
) -> None:
    with Scheduler(runtime, 2) as scheduler:
        loops.at = depth + 7 if len(prompt) == 1 else 7  # in the second token of the one, in the prompt of the other
        loops.act = lambda: handle.cancel()
        handle = scheduler.submit(request(runtime, prompt, loops=depth, max_tokens=50))
        with pytest.raises(CancelledError) as caught:
            handle.result(WAIT)
        eventually(lambda: scheduler.metrics().running == 0)
        assert loops.ran == loops.at
        assert len(caught.value.generation.token_ids) == (1 if len(prompt) == 1 else 0)
        again = scheduler.submit(request(runtime, prompt, max_tokens=9)).result(WAIT)
    assert again == runtime.generate(prompt, max_tokens=9, ignore_eos=True)


def test_a_deadline_is_kept_in_the_middle_of_the_loops(runtime: Runtime, loops: Loops) -> None:
    with Scheduler(runtime, 1) as scheduler:
        loops.at, loops.act = 5, lambda: setattr(handle, "due", 0.0)
        handle = scheduler.submit(request(runtime, [5], loops=MAX_LOOPS, limits={"deadline": 600.0}))
        with pytest.raises(DeadlineError):
            handle.result(WAIT)
        eventually(lambda: scheduler.metrics().running == 0)
        assert loops.ran == 5


def test_closing_does_not_wait_for_the_loops(runtime: Runtime, loops: Loops) -> None:
    scheduler = Scheduler(runtime, 1)
    loops.at = 5
    closing = threading.Thread(target=scheduler.close, args=(False,))

    def close() -> None:
        closing.start()
        eventually(lambda: scheduler._stopping)

    loops.act = close
    handle = scheduler.submit(request(runtime, [5], loops=MAX_LOOPS))
    with pytest.raises(CancelledError):
        handle.result(WAIT)
    closing.join(WAIT)
    assert not closing.is_alive()
    assert loops.ran == 5


def test_who_waits_for_a_slot_ends_while_another_is_in_its_loops(runtime: Runtime, loops: Loops) -> None:
    with Scheduler(runtime, 1) as scheduler:
        seen = []

        def late() -> None:
            waiting.due = 0.0

        loops.at, loops.act = 5, late
        gate = threading.Event()
        deep = scheduler.submit(request(runtime, [5], loops=MAX_LOOPS, max_tokens=1), lambda event: seen.append(event))
        waiting = scheduler.submit(
            request(runtime, [6], limits={"deadline": 600.0}), lambda event: (seen.append(event), gate.set())
        )
        assert gate.wait(WAIT)
        assert [event.finish_reason for event in seen] == ["deadline"], "before the deep one had its first token"
        assert deep.result(WAIT).depth == (MAX_LOOPS,)


@pytest.mark.parametrize("kind", ["onnxruntime", "portable", "looplm"])
@pytest.mark.parametrize("at", [3, 9, 14, 15, 22])
def test_who_shares_a_step_with_one_that_ends_in_it_gets_what_it_gets_alone(
    make_checkpoint: MakeCheckpoint,
    make_looplm: MakeCheckpoint,
    make_package: MakePackage,
    loops: Loops,
    kind: str,
    at: int,
) -> None:
    made = make_package(make_looplm(), chunk=8) if kind == "looplm" else make_package(make_checkpoint(), dialect=kind)
    runtime = Runtime.load(made)
    deepest = 4 if kind == "looplm" else 12
    with Scheduler(runtime, 2) as scheduler:
        handles = []
        loops.at = at
        loops.act = lambda: [handle.cancel() for handle in handles[:1]]
        for depth, prompt in ((deepest, [5, 6, 7]), (2, [8, 9])):
            handles.append(scheduler.submit(request(runtime, prompt, loops=depth, max_tokens=12)))
        found = handles[1].result(WAIT)
        with pytest.raises(CancelledError):
            handles[0].result(WAIT)
        later = scheduler.submit(request(runtime, [4, 4, 4], loops=3, max_tokens=12)).result(WAIT)
    assert found == runtime.generate([8, 9], loops=2, max_tokens=12, ignore_eos=True)
    assert later == runtime.generate([4, 4, 4], loops=3, max_tokens=12, ignore_eos=True)


def test_a_thread_that_stands_still_is_seen_and_one_without_work_is_not(runtime: Runtime, loops: Loops) -> None:
    stood, go = threading.Event(), threading.Event()

    def stand() -> None:
        stood.set()
        go.wait(WAIT)

    with Scheduler(runtime, 1) as scheduler:
        loops.at, loops.act = 3, stand
        handle = scheduler.submit(request(runtime, [5], max_tokens=2))
        assert stood.wait(WAIT)
        before = scheduler.stalled
        eventually(lambda: scheduler.stalled > before > 0)
        go.set()
        handle.result(WAIT)
        eventually(lambda: scheduler.stalled == 0.0)


# One bound for everybody


@pytest.mark.parametrize("loops", [MAX_LOOPS + 1, 10**9, 10**5000], ids=["one", "many", "digits"])
def test_a_depth_beyond_the_bound_is_refused_before_anything_runs(runtime: Runtime, loops: int) -> None:
    with pytest.raises(ArgumentError, match="above 1,024"):
        runtime.generate([5], loops=loops)


def test_a_package_beyond_the_bound_is_refused(package_copy: Path) -> None:
    edit(package_copy, lambda m: m.update(loops=10**9))
    with pytest.raises(PackageError, match="loops"):
        Package.open(package_copy)
