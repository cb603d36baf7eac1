"""Threads, streams, sessions and a scheduler over one Runtime: each gives what it gives alone, or says why not."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_parts
from melt_runtime import BackendError, Generator, LoopDriver, OvertakenError, PrefixCache, Request, Runtime, Scheduler

every_backend = test_parts.runtime
WAIT = 120.0  # seconds until a test gives up on a thread
PROMPT, OTHER = list(range(3, 22)), [30, 31, 32]
LONG: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True}
SAMPLED: dict[str, Any] = {**LONG, "temperature": 1.3, "seed": 5}

Job = Callable[[], Any]


@pytest.fixture
def runtime(tiny_package: Path) -> Runtime:
    return Runtime.load(tiny_package, threads=1)


class Call(threading.Thread):
    """A job in a thread of its own, begun at once."""

    def __init__(self, job: Job, begin: threading.Barrier | None = None):
        super().__init__(daemon=True)
        self.job, self.begin = job, begin
        self.value: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            if self.begin is not None:
                self.begin.wait(WAIT)
            self.value = self.job()
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        """What it returned. Raises what it raised."""
        self.join(WAIT)
        assert not self.is_alive(), "the call hangs"
        if self.error is not None:
            raise self.error
        return self.value


class Few:
    """A backend with memory for so many states at a time; it counts those that were opened."""

    def __init__(self, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, most: int = 1 << 10):
        self.opened, self.most, self.live = 0, most, weakref.WeakSet[Any]()
        self.open_state = runtime.backend.open_state
        monkeypatch.setattr(runtime.backend, "open_state", self.open)

    def open(self, batch: int) -> Any:
        if len(self.live) >= self.most:
            raise BackendError("there is no memory for another state")
        state = self.open_state(batch)
        self.opened += 1
        self.live.add(state)
        return state


class Gate:
    """Holds whoever runs a chunk, once it is closed, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.reached, self.opened = threading.Event(), threading.Event()
        self.opened.set()
        advance = LoopDriver.advance

        def held(driver: LoopDriver, *arguments: Any, **how: Any) -> Any:
            if not self.opened.is_set():
                self.reached.set()
                assert self.opened.wait(WAIT)
            return advance(driver, *arguments, **how)

        monkeypatch.setattr(LoopDriver, "advance", held)


def conversation(runtime: Runtime, prefixes: PrefixCache | None = None, **options: Any) -> list[Any]:
    """All that a session does."""
    session = runtime.session(prefixes=prefixes, **{**LONG, **options})
    session.append(PROMPT)
    said: list[Any] = [session.generate(max_tokens=5)]
    branch = session.fork()
    session.append(OTHER)
    said += [delta.token_id for delta in session.deltas(max_tokens=6)]
    branch.rewind(3)
    return [*said, branch.generate().token_ids, session.tokens, session.depth]


def scheduled(runtime: Runtime, scheduler: Scheduler) -> list[Job]:
    """Requests to a scheduler."""
    requests = [
        Request(tuple(PROMPT), runtime.options(**LONG, temperature=0.9, seed=1)),
        Request(tuple(OTHER), runtime.options(**LONG, loops=2)),
    ]
    return [lambda request=request: scheduler.submit(request).result(WAIT) for request in requests]  # type: ignore[misc]


def calls_of(runtime: Runtime) -> list[Job]:
    """Calls of every kind, none like another."""
    prefixes = PrefixCache(1 << 20)
    jobs: list[Job] = [
        lambda: runtime.generate(PROMPT, **LONG),
        lambda: runtime.generate(OTHER, **SAMPLED, exit_threshold=1.0 if runtime.manifest.cache_loops else 0.7),
        lambda: runtime.generate([PROMPT, OTHER, [9]], **SAMPLED),
        lambda: conversation(runtime),
        lambda: conversation(runtime, prefixes, temperature=1.1, seed=3),
    ]
    if runtime.tokenizer is not None:
        jobs += [
            lambda: list(runtime.stream("hello there", **LONG)),
            lambda: list(runtime.stream(OTHER, **SAMPLED)),
            lambda: list(runtime.stream(PROMPT, loops=2, **LONG)),
        ]
    return jobs


def together(jobs: list[Job], rounds: int) -> list[list[Any]]:
    """What each job gives in each round while all the others run."""
    begin = threading.Barrier(len(jobs))
    calls = [Call(lambda job=job: [job() for _ in range(rounds)], begin) for job in jobs]  # type: ignore[misc]
    return [call.result() for call in calls]


def test_calls_of_every_kind_give_together_what_each_gives_alone(runtime: Runtime) -> None:
    with Scheduler(runtime, 3) as scheduler:
        jobs = calls_of(runtime) + scheduled(runtime, scheduler)
        alone = [job() for job in jobs]
        for one, rounds in zip(alone, together(jobs, 4), strict=True):
            assert rounds == [one] * 4


def test_calls_of_every_kind_give_together_what_each_gives_alone_on_every_backend(every_backend: Runtime) -> None:
    with Scheduler(every_backend, 3) as scheduler:
        jobs = calls_of(every_backend) + scheduled(every_backend, scheduler)
        alone = [job() for job in jobs]
        assert [rounds[0] for rounds in together(jobs, 1)] == alone


# Streams


def test_streams_read_in_turn_give_what_each_gives_alone(runtime: Runtime) -> None:
    prompts: list[Any] = ["hello", PROMPT, OTHER]
    alone = [list(runtime.stream(prompt, **LONG)) for prompt in prompts]
    streams = [runtime.stream(prompt, **LONG) for prompt in prompts]
    read: list[list[str]] = [[] for _ in prompts]
    for _ in range(LONG["max_tokens"] + 1):
        for deltas, stream in zip(read, streams, strict=True):
            deltas += [delta for delta in [next(stream, None)] if delta is not None]
    assert read == alone


def test_a_half_read_stream_holds_nobody_up_and_goes_on_rightly(runtime: Runtime) -> None:
    expected, alone = "".join(runtime.stream("hello", **LONG)), runtime.generate(PROMPT, **LONG)
    stream = runtime.stream("hello", **LONG)
    said = next(stream)
    assert runtime.generate(PROMPT, **LONG) == alone
    assert Call(lambda: runtime.generate(PROMPT, **LONG)).result() == alone
    assert said + "".join(stream) == expected


def test_calls_one_after_another_share_one_state(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Few(runtime, monkeypatch)
    for _ in range(2):
        runtime.generate(PROMPT, **LONG)
        "".join(runtime.stream("hello", **LONG))
        for _piece in runtime.stream("hello", **LONG):
            break
    Call(lambda: runtime.generate(PROMPT, **LONG)).result()
    assert few.opened == 1


def test_simultaneous_calls_of_generate_share_one_state(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Few(runtime, monkeypatch)
    together([lambda: runtime.generate(PROMPT, **LONG)] * 6, 2)
    assert few.opened == 1


def test_when_streams_have_ended_one_state_is_kept(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Few(runtime, monkeypatch)
    streams = [runtime.stream("hello", **LONG) for _ in range(4)]
    for stream in streams:
        next(stream)
    assert len(few.live) == 4
    del stream, streams[3]  # left half-read
    for stream in streams:
        "".join(stream)
    assert len(few.live) == 1


@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, OTHER]], ids=["same size", "other size"])
def test_without_memory_for_both_the_new_call_runs_and_the_half_read_stream_says_so(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]
) -> None:
    few = Few(runtime, monkeypatch, most=1)
    alone, said = runtime.generate(prompts, **LONG), "".join(runtime.stream("hello", **LONG))
    stream, unread = runtime.stream("hello", **LONG), runtime.stream("hello", **LONG)
    next(stream)
    assert runtime.generate(prompts, **LONG) == alone
    with pytest.raises(OvertakenError, match="begin another"):
        next(stream)
    assert "".join(unread) == said
    assert list(stream) == []
    assert len(few.live) <= 1


def test_without_memory_the_stream_that_was_read_longest_ago_is_overtaken(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    Few(runtime, monkeypatch, most=2)
    first, second = runtime.stream("hello", **LONG), runtime.stream("hello", **LONG)
    next(first)
    next(second)
    next(first)
    runtime.generate(PROMPT, **LONG)
    next(first)
    with pytest.raises(OvertakenError):
        next(second)


def test_without_memory_a_call_that_computes_is_waited_for(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, said = runtime.generate(PROMPT, **LONG), "".join(runtime.stream("hello", **LONG))
    few, gate = Few(runtime, monkeypatch), Gate(monkeypatch)
    few.most = 0  # the Runtime's own is all there is
    gate.opened.clear()
    first = Call(lambda: runtime.generate(PROMPT, **LONG))
    assert gate.reached.wait(WAIT)
    second = Call(lambda: "".join(runtime.stream("hello", **LONG)))
    second.join(0.1)
    gate.opened.set()
    assert (first.result(), second.result()) == (alone, said)


def test_without_memory_a_stream_that_computes_ends_its_step_and_is_overtaken(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = runtime.generate(PROMPT, **LONG)
    few, gate = Few(runtime, monkeypatch), Gate(monkeypatch)
    few.most = 0
    stream = runtime.stream("hello", **LONG)
    next(stream)
    gate.opened.clear()
    reading = Call(lambda: next(stream))
    assert gate.reached.wait(WAIT)
    second = Call(lambda: runtime.generate(PROMPT, **LONG))
    second.join(0.1)
    gate.opened.set()
    assert second.result() == alone
    assert len(reading.result()) == 1
    with pytest.raises(OvertakenError):
        next(stream)


def test_an_error_in_a_call_leaves_the_state_to_the_next(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = runtime.generate(PROMPT, **LONG)
    few = Few(runtime, monkeypatch)

    def fails(*arguments: Any, **options: Any) -> None:
        raise BackendError("it broke")

    with monkeypatch.context() as patch:
        patch.setattr(LoopDriver, "advance", fails)
        for call in (lambda: runtime.generate(PROMPT, **LONG), lambda: next(runtime.stream("hello", **LONG))):
            with pytest.raises(BackendError, match="it broke"):
                call()
    assert runtime.generate(PROMPT, **LONG) == alone
    assert few.opened == 0


def test_a_batch_that_does_not_fit_at_all_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Few(runtime, monkeypatch, most=0)
    with pytest.raises(BackendError, match="no memory"):
        runtime.generate(PROMPT, **LONG)
    few.most = 1
    assert len(runtime.generate(PROMPT, **LONG).token_ids) == LONG["max_tokens"]


# What several calls share on purpose


def test_generators_over_one_driver_overtake_each_other(runtime: Runtime) -> None:
    driver, request = runtime.driver(), runtime.options(**LONG)
    alone = list(Generator(runtime.driver(), [PROMPT], request, runtime.tokenizer))
    first = iter(Generator(driver, [PROMPT], request, runtime.tokenizer))
    assert [next(first) for _ in range(3)] == alone[:3]
    driver.reset()
    second = Generator(driver, [PROMPT], request, runtime.tokenizer)
    assert list(second) == alone
    driver.append([OTHER], request.loops)
    with pytest.raises(OvertakenError, match="a driver of its own"):
        next(first)
    assert len(second.results()[0].depth) == len(PROMPT) + LONG["max_tokens"] - 1


def test_threads_in_one_session_continue_it_one_after_the_other(runtime: Runtime) -> None:
    expected = runtime.generate(PROMPT, **{**LONG, "max_tokens": 40}).token_ids
    session = runtime.session(ignore_eos=True)
    session.append(PROMPT)
    parts = [one[0].token_ids for one in together([lambda: session.generate(max_tokens=5)] * 8, 1)]
    assert session.tokens == (*PROMPT, *expected)
    assert sorted(parts) == sorted(expected[at : at + 5] for at in range(0, 40, 5))


def test_a_sessions_stream_that_another_thread_overtakes_says_so(runtime: Runtime) -> None:
    session = runtime.session(ignore_eos=True)
    session.append(PROMPT)
    stream = session.stream(max_tokens=9)
    next(stream)
    Call(lambda: session.append(OTHER)).result()
    with pytest.raises(OvertakenError, match="moved on"):
        next(stream)
