"""Whatever fails, every handle ends, closing returns, and what can go on goes on."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from melt_runtime import (
    ArgumentError,
    BackendError,
    CancelledError,
    ClosedError,
    Generation,
    MeltError,
    Request,
    Runtime,
    Scheduler,
    TextDelta,
)
from melt_runtime.backends.onnxruntime_cpu import OnnxRuntimeState
from melt_runtime.scheduler import scheduler as scheduler_module
from melt_runtime.scheduler.slots import Slots
from test_scheduler import WAIT, Gate, request


@pytest.fixture(scope="module")
def runtime(tiny_package: Path) -> Runtime:
    return Runtime.load(tiny_package)


class Faulty:
    """A backend that fails, or stands still, when it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = None
        self.graph = "loop_step"
        self.go = threading.Event()
        self.go.set()
        self.stood = threading.Event()
        run = OnnxRuntimeState.run

        def faulty(state: OnnxRuntimeState, graph: str, bound: Any) -> None:
            if not self.go.is_set():
                self.stood.set()
                self.go.wait(WAIT)
            if self.error is not None and graph == self.graph:
                raise self.error
            run(state, graph, bound)

        patch.setattr(OnnxRuntimeState, "run", faulty)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    made = Faulty(monkeypatch)
    yield made
    made.go.set()


@pytest.mark.parametrize("graph", ["embed", "loop_step", "lm_head"])
@pytest.mark.parametrize("error", [BackendError("the device is gone"), RuntimeError("out of luck")])
def test_a_failure_of_the_backend_ends_what_runs_and_not_what_waits(
    runtime: Runtime, backend: Faulty, graph: str, error: Exception
) -> None:
    gate, broken = Gate(), list[Any]()

    def mend(event: Any) -> None:
        broken.append(event)
        if isinstance(event, MeltError):
            backend.error = None

    with Scheduler(runtime, 2) as scheduler:
        first = scheduler.submit(request(runtime, [5, 6], max_tokens=50), gate)
        assert gate.reached.wait(WAIT)
        second = scheduler.submit(request(runtime, range(3, 30), max_tokens=50), mend)
        waiting = scheduler.submit(request(runtime, [7, 8], max_tokens=6))
        backend.error, backend.graph = error, graph
        gate.opened.set()
        for handle in (first, second):
            with pytest.raises(BackendError, match=r"device is gone|out of luck") as caught:
                handle.result(WAIT)
            assert error in (caught.value, caught.value.__cause__)
        assert waiting.result(WAIT) == runtime.generate([7, 8], max_tokens=6, ignore_eos=True)
        assert scheduler.metrics().requests["failed"] == 2
        assert scheduler.metrics().running == 0
    assert isinstance(broken[-1], BackendError)
    with pytest.raises(BackendError):
        list(first)


def test_a_backend_that_fails_for_good_ends_every_request_and_closing_returns(
    runtime: Runtime, backend: Faulty
) -> None:
    backend.error = BackendError("the device is gone")
    scheduler = Scheduler(runtime, 2)
    handles = [scheduler.submit(request(runtime, [5, 6], max_tokens=5)) for _ in range(9)]
    scheduler.close()
    for handle in handles:
        with pytest.raises(BackendError, match="device is gone"):
            handle.result(0)


def test_a_listener_that_raises_ends_its_own_request_alone(runtime: Runtime) -> None:
    heard: list[Any] = []

    def listen(event: Any) -> None:
        heard.append(event)
        if len(heard) == 2:
            raise KeyError("no such stream")

    gate = Gate()
    with Scheduler(runtime, 3) as scheduler:
        scheduler.submit(request(runtime, [4], max_tokens=1), gate)
        bad = scheduler.submit(request(runtime, [5, 6], max_tokens=20), listen)
        good = scheduler.submit(request(runtime, [7, 8], max_tokens=20))
        gate.opened.set()
        with pytest.raises(MeltError, match="listener failed: KeyError"):
            bad.result(WAIT)
        assert good.result(WAIT) == runtime.generate([7, 8], max_tokens=20, ignore_eos=True)
    assert len(heard) == 2
    assert all(isinstance(event, TextDelta) for event in heard)


def test_a_listener_that_raises_at_the_end_changes_nothing(runtime: Runtime) -> None:
    def listen(event: Any) -> None:
        if isinstance(event, Generation):
            raise ValueError("too late")

    with Scheduler(runtime, 1) as scheduler:
        for _ in range(2):
            assert scheduler.submit(request(runtime, [5], max_tokens=2), listen).result(WAIT).finish_reason == "length"


class Bad:
    """A constraint that allows nothing, raises, has another vocabulary, or returns what is no array."""

    def __init__(self, how: str):
        self.how = how

    def mask(self, history: Sequence[int]) -> Any:
        if self.how == "raises":
            raise ZeroDivisionError("grammar")
        if self.how == "ragged":
            return [[True], [True, False]]
        return np.zeros(50, bool) if self.how == "nothing" else np.ones(49, bool)

    def accept(self, token: int) -> None:
        raise AssertionError("nothing was drawn")


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("nothing", ArgumentError, "allows no token"),
        ("shape", ArgumentError, r"shape \(49,\)"),
        ("raises", ArgumentError, "constraint failed: ZeroDivisionError"),
        ("ragged", ArgumentError, "constraint failed: ValueError"),
    ],
)
def test_a_constraint_that_fails_ends_its_own_request_alone(
    runtime: Runtime, how: str, kind: type[Exception], words: str
) -> None:
    gate = Gate()
    with Scheduler(runtime, 3) as scheduler:
        scheduler.submit(request(runtime, [4], max_tokens=1), gate)
        bad = scheduler.submit(request(runtime, [5, 6], max_tokens=20, limits={"constraint": Bad(how)}))
        good = scheduler.submit(request(runtime, [7, 8], max_tokens=20))
        gate.opened.set()
        with pytest.raises(kind, match=words):
            bad.result(WAIT)
        assert good.result(WAIT) == runtime.generate([7, 8], max_tokens=20, ignore_eos=True)
        assert scheduler.metrics().running == 0


# Closing


def test_closing_runs_what_was_handed_in(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime, 2)
    handles = [scheduler.submit(request(runtime, [5, at], max_tokens=7)) for at in range(3, 10)]
    scheduler.close()
    for at, handle in zip(range(3, 10), handles, strict=True):
        assert handle.result(0) == runtime.generate([5, at], max_tokens=7, ignore_eos=True)


@pytest.mark.parametrize("timeout", [None, 0.01])
def test_closing_without_draining_cancels_what_runs_and_what_waits(runtime: Runtime, timeout: float | None) -> None:
    gate = Gate()
    scheduler = Scheduler(runtime, 1)
    running = scheduler.submit(request(runtime, [5], max_tokens=200), gate)
    waiting = scheduler.submit(request(runtime, [6], max_tokens=200))
    assert gate.reached.wait(WAIT)
    closing = threading.Thread(target=scheduler.close, args=(timeout is not None, timeout))
    closing.start()
    while not scheduler._stopping:  # drained for a moment, or not at all
        closing.join(0.001)
    gate.opened.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    for handle, drawn in ((running, 1), (waiting, 0)):
        with pytest.raises(CancelledError) as caught:
            handle.result(0)
        assert len(caught.value.generation.token_ids) == drawn


def test_a_program_may_end_without_closing(tiny_package: Path) -> None:
    program = f"""
from melt_runtime import Request, Runtime, Scheduler
runtime = Runtime.load({str(tiny_package)!r})
scheduler = Scheduler(runtime, 2)
options = runtime.options(max_tokens=200, ignore_eos=True)
handles = [scheduler.submit(Request((5, 6), options)) for _ in range(6)]
next(iter(handles[0]))
print("bye")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT, check=False)
    assert (ran.returncode, ran.stdout) == (0, "bye\n"), ran.stderr


def test_a_listener_may_close_the_scheduler(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime, 1)
    handle = scheduler.submit(request(runtime, [5], max_tokens=3), lambda event: scheduler.close())
    assert handle.result(WAIT).finish_reason == "length"
    scheduler._thread.join(WAIT)
    assert not scheduler._thread.is_alive()
    with pytest.raises(ClosedError):
        scheduler.submit(request(runtime, [5]))


def test_a_backend_that_stands_still_holds_up_neither_closing_nor_tickets(
    runtime: Runtime, backend: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "_GRACE", 0.05)
    backend.go.clear()
    scheduler = Scheduler(runtime, 1)
    handles = [scheduler.submit(request(runtime, [5], max_tokens=3)) for _ in range(2)]
    assert backend.stood.wait(WAIT)
    scheduler.close(drain=False)
    for handle in handles:
        with pytest.raises(BackendError, match="did not come back"):
            handle.result(0)
    backend.go.set()
    scheduler._thread.join(WAIT)
    assert not scheduler._thread.is_alive()


def test_an_error_in_a_with_block_does_not_wait_for_what_runs(runtime: Runtime) -> None:
    handles = []

    def application() -> None:
        with Scheduler(runtime, 1) as scheduler:
            handles.extend(scheduler.submit(request(runtime, [5], max_tokens=200)) for _ in range(3))
            raise KeyError("the application's own")

    with pytest.raises(KeyError):
        application()
    assert all(handle.done for handle in handles)


def test_a_fault_of_the_scheduler_itself_leaves_nobody_waiting(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(self: Slots, sequence: Any, reason: str | None = None) -> Generation:
        raise AssertionError("a bug")

    scheduler = Scheduler(runtime, 1)
    monkeypatch.setattr(Slots, "end", end)
    handles = [scheduler.submit(request(runtime, [5], max_tokens=2))]
    with pytest.raises(BackendError, match="a bug"):
        handles[0].result(WAIT)
    scheduler._thread.join(WAIT)
    with pytest.raises(ClosedError):
        scheduler.submit(request(runtime, [5]))
    scheduler.close()


def test_many_threads_that_come_and_go_all_get_their_own(runtime: Runtime) -> None:
    prompts = [[3 + at, 9, 4 + at] for at in range(24)]
    alone = [
        runtime.generate(prompt, max_tokens=10, loops=1 + at % 3, ignore_eos=True) for at, prompt in enumerate(prompts)
    ]
    found: dict[int, Any] = {}

    def ask(at: int, scheduler: Scheduler) -> None:
        handle = scheduler.submit(request(runtime, prompts[at], max_tokens=10, loops=1 + at % 3))
        if at % 4 == 3:
            next(iter(handle), None)
            handle.cancel()
        try:
            found[at] = handle.result(WAIT)
        except CancelledError as error:
            found[at] = error.generation

    with Scheduler(runtime, 5) as scheduler:
        threads = [threading.Thread(target=ask, args=(at, scheduler)) for at in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert sum(scheduler.metrics().requests.values()) == len(prompts)
    for at, expected in enumerate(alone):
        got = found[at]
        assert got.token_ids == expected.token_ids[: len(got.token_ids)]
        assert got == expected or got.finish_reason == "cancelled"


def test_waiting_for_a_result_may_be_given_up_and_taken_up_again(runtime: Runtime) -> None:
    gate = Gate()
    with Scheduler(runtime, 1) as scheduler:
        handle = scheduler.submit(Request((5,), runtime.options(max_tokens=2, ignore_eos=True)), gate)
        with pytest.raises(TimeoutError, match="not over"):
            handle.result(0.01)
        gate.opened.set()
        assert len(handle.result(WAIT).token_ids) == 2
