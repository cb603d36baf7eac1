"""Continuous batching: every request gets what it gets alone, streams keep flowing, and who ends makes room."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import CancelledError, DeadlineError, Generation, LoopDriver, Request, Runtime, Scheduler, TextDelta
from melt_runtime.scheduler import request as ticket_module
from melt_runtime.scheduler import scheduler as scheduler_module

WAIT = 60.0  # seconds after which a test gives up; nothing here should take one


@pytest.fixture(scope="module")
def runtime(tiny_package: Path) -> Runtime:
    return Runtime.load(tiny_package)


def request(
    runtime: Runtime, prompt: Sequence[int], *, limits: dict[str, Any] | None = None, **options: Any
) -> Request:
    """A request that goes on to max_tokens."""
    return Request(tuple(prompt), runtime.options(**{"ignore_eos": True, **options}), **(limits or {}))


class Gate:
    """A listener that holds the scheduler's thread at its first delta until it is opened: a test's way to be first."""

    def __init__(self) -> None:
        self.reached, self.opened, self.events = threading.Event(), threading.Event(), list[Any]()

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        self.reached.set()
        assert self.opened.wait(WAIT)


def mixed(runtime: Runtime, count: int = 12) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts from 1 token to several chunks, each with its own length, depth and way of drawing."""
    rng = np.random.default_rng(5)
    lengths = [1, 30, 8, 9, 17, 2, 5, 60, 12, 3, 24, 7]
    found = []
    for index, length in enumerate(lengths[:count]):
        options: dict[str, Any] = {"max_tokens": 3 + 5 * index % 17, "loops": 1 + index % 4}
        if index % 5 == 4:
            options |= {"temperature": 1.2, "seed": index, "top_k": 12}
        if index % 3 == 2:
            options |= {"chunk": 1 + index % 8}
        found.append((rng.integers(3, 50, length).tolist(), options))
    return found


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("kind", ["onnxruntime", "standard", "portable", "looplm"])
def test_every_request_gets_what_it_gets_alone(
    make_checkpoint: MakeCheckpoint, make_looplm: MakeCheckpoint, make_package: MakePackage, kind: str, slots: int
) -> None:
    package = (
        make_package(make_looplm(), chunk=8) if kind == "looplm" else make_package(make_checkpoint(), dialect=kind)
    )
    runtime = Runtime.load(package)
    work = mixed(runtime)
    if kind != "looplm":
        work = [
            (ids, {**options, "exit_threshold": 0.8} if at % 2 else options) for at, (ids, options) in enumerate(work)
        ]
    alone = [runtime.generate(ids, ignore_eos=True, **options) for ids, options in work]
    with Scheduler(runtime, slots) as scheduler:
        handles = [scheduler.submit(request(runtime, ids, **options)) for ids, options in work]
        assert [handle.result(WAIT) for handle in handles] == alone


def test_logits_of_a_stream_are_those_of_the_stream_alone_to_the_last_bit(runtime: Runtime) -> None:
    work = mixed(runtime, 6)
    found = []
    for slots in (1, 4):
        with Scheduler(runtime, slots) as scheduler:
            handles = [
                scheduler.submit(request(runtime, ids, limits={"logprobs": 50}, **options)) for ids, options in work
            ]
            found.append([[delta.logprobs for delta in handle] for handle in handles])
    assert found[0] == found[1]


def test_pieces_make_up_the_generation(runtime: Runtime) -> None:
    with Scheduler(runtime, 2) as scheduler:
        events: list[Any] = []
        handle = scheduler.submit(request(runtime, [5, 6, 7], max_tokens=9, loops=3), events.append)
        deltas = list(handle)
        result = handle.result()
    assert [delta.token_id for delta in deltas] == list(result.token_ids)
    assert "".join(delta.text for delta in deltas) == result.text
    assert [delta.finish_reason for delta in deltas] == [None] * 8 + ["length"]
    assert {delta.depth for delta in deltas} == {3}
    assert events == [*deltas, result]
    assert list(handle) == []  # each delta comes once, and a second look does not wait


def test_a_running_stream_flows_while_a_long_prompt_is_prefilled(runtime: Runtime) -> None:
    gate, order = Gate(), list[str]()
    with Scheduler(runtime, 2) as scheduler:
        stream = scheduler.submit(request(runtime, [5], max_tokens=40), gate)
        assert gate.reached.wait(WAIT)
        long = scheduler.submit(request(runtime, range(3, 43), max_tokens=1, chunk=5), lambda e: order.append("long"))
        before = len(gate.events)
        gate.opened.set()
        long.result(WAIT)
        during = len(gate.events) - before
        stream.result(WAIT)
    assert order == ["long", "long"]
    assert during >= 7  # one token after each chunk but the last


def test_prompts_are_prefilled_in_turn(runtime: Runtime) -> None:
    gate, order = Gate(), list[str]()
    with Scheduler(runtime, 4) as scheduler:
        scheduler.submit(request(runtime, [5], max_tokens=1), gate)
        assert gate.reached.wait(WAIT)
        lengths = {"long": 64, "short": 8, "middle": 24}
        handles = [
            scheduler.submit(request(runtime, [7] * length, max_tokens=1), lambda e, name=name: order.append(name))
            for name, length in lengths.items()
        ]
        gate.opened.set()
        for handle in handles:
            handle.result(WAIT)
    assert order[::2] == ["short", "middle", "long"]


def test_who_waits_is_admitted_in_order(runtime: Runtime) -> None:
    gate, order = Gate(), list[int]()
    with Scheduler(runtime, 1) as scheduler:
        scheduler.submit(request(runtime, [5], max_tokens=2), gate)
        assert gate.reached.wait(WAIT)
        handles = [
            scheduler.submit(request(runtime, [9], max_tokens=3), lambda e, at=at: order.append(at)) for at in range(4)
        ]
        assert scheduler.metrics().waiting == 4
        gate.opened.set()
        for handle in handles:
            handle.result(WAIT)
    assert order == [at for at in range(4) for _ in range(4)]


def test_slots_stay_together_so_that_few_decode_as_few(runtime: Runtime) -> None:
    widths = set()
    with Scheduler(runtime, 8) as scheduler:
        advance = LoopDriver.advance
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LoopDriver, "advance", lambda self, *a: widths.add(self.batch) or advance(self, *a))
            for _ in range(3):
                scheduler.submit(request(runtime, [5, 6], max_tokens=4)).result(WAIT)
    assert widths == {1}


def test_prefill_runs_on_its_slot_alone(runtime: Runtime) -> None:
    work = []
    advance = LoopDriver.advance
    with Scheduler(runtime, 4) as scheduler, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LoopDriver,
            "advance",
            lambda self, tokens, *a: work.append([len(ids) for ids in tokens]) or advance(self, tokens, *a),
        )
        handles = [scheduler.submit(request(runtime, range(3, 23), max_tokens=6)) for _ in range(4)]
        for handle in handles:
            handle.result(WAIT)
    assert all(len(counts) == 1 for counts in work if max(counts) > 1)
    assert max(len(counts) for counts in work) == 4


def test_a_backend_without_parts_runs_the_whole_batch(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopDriver, "part", lambda self, first, count: None)
    work = mixed(runtime, 7)
    with Scheduler(runtime, 3) as scheduler:
        handles = [scheduler.submit(request(runtime, ids, **options)) for ids, options in work]
        found = [handle.result(WAIT).token_ids for handle in handles]
    assert found == [runtime.generate(ids, ignore_eos=True, **options).token_ids for ids, options in work]


# Ending early


def test_a_cancelled_stream_ends_with_the_next_token_and_frees_its_slot(runtime: Runtime) -> None:
    events: list[Any] = []

    def listen(event: Any) -> None:
        events.append(event)
        if len(events) == 3:
            handle.cancel()

    with Scheduler(runtime, 1) as scheduler:
        gate = Gate()
        blocker = scheduler.submit(request(runtime, [4], max_tokens=1), gate)
        handle = scheduler.submit(request(runtime, [5, 6], max_tokens=200), listen)
        after = scheduler.submit(request(runtime, [7, 8], max_tokens=5))
        gate.opened.set()
        blocker.result(WAIT)
        with pytest.raises(CancelledError) as caught:
            handle.result(WAIT)
        assert after.result(WAIT) == runtime.generate([7, 8], max_tokens=5, ignore_eos=True)
        assert scheduler.metrics().requests["cancelled"] == 1
    generation = caught.value.generation
    assert generation.finish_reason == "cancelled"
    assert len(generation.token_ids) == 3
    assert events[-1] == generation
    assert len(list(handle)) == 3  # iterating ends quietly


@pytest.mark.parametrize("threshold", [1.0, 0.8])
def test_one_that_leaves_half_way_changes_no_bit_of_the_others(runtime: Runtime, threshold: float) -> None:
    options = {"max_tokens": 30, "exit_threshold": threshold, "limits": {"logprobs": 50}}

    def others(leaves: bool) -> list[list[Any]]:
        """Every logprob of two streams beside a third, which goes after nine tokens or stays."""
        events: list[Any] = []

        def listen(event: Any) -> None:
            events.append(event)
            if leaves and len(events) == 9:
                first.cancel()

        with Scheduler(runtime, 3) as scheduler:
            gate = Gate()
            blocker = scheduler.submit(request(runtime, [4], max_tokens=1), gate)
            first = scheduler.submit(request(runtime, [5, 6, 7], **options), listen)
            rest = [scheduler.submit(request(runtime, prompt, **options)) for prompt in ([30, 31], [40, 41, 42])]
            gate.opened.set()
            blocker.result(WAIT)
            found = [[delta.logprobs for delta in handle] for handle in rest]
        assert len(events) == (10 if leaves else 31)
        return found

    stayed = others(leaves=False)
    assert [len(one) for one in stayed] == [30, 30]
    assert others(leaves=True) == stayed


def test_a_request_cancelled_while_it_waits_never_runs(runtime: Runtime) -> None:
    gate, events = Gate(), list[Any]()
    with Scheduler(runtime, 1) as scheduler:
        scheduler.submit(request(runtime, [5], max_tokens=2), gate)
        assert gate.reached.wait(WAIT)
        handle = scheduler.submit(request(runtime, [6], max_tokens=5), events.append)
        handle.cancel()
        gate.opened.set()
        with pytest.raises(CancelledError) as caught:
            handle.result(WAIT)
    assert events == [caught.value.generation] == [Generation("", (), "cancelled", 1, (), 4)]


def test_text_that_was_held_back_is_in_what_a_cancelled_request_leaves(runtime: Runtime) -> None:
    free = runtime.generate("abc", max_tokens=12, ignore_eos=True).text
    stop = free[4:6] + "~~~~"  # begins like the text and never comes, so that the last characters are held back

    def listen(event: Any) -> None:
        if isinstance(event, TextDelta) and event.token_id is not None:
            seen.append(event.text)
            if len(seen) == 6:
                handle.cancel()

    seen: list[str] = []
    with Scheduler(runtime, 1) as scheduler:
        gate = Gate()
        scheduler.submit(request(runtime, [4], max_tokens=1), gate)
        handle = scheduler.submit(request(runtime, runtime.encode("abc"), max_tokens=100, stop=stop), listen)
        gate.opened.set()
        with pytest.raises(CancelledError) as caught:
            handle.result(WAIT)
    assert "".join(seen) != free[:6]
    assert caught.value.generation.text == free[:6]


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        patch.setattr(scheduler_module, "monotonic", lambda: self.now)
        patch.setattr(ticket_module, "monotonic", lambda: self.now)


def test_a_request_whose_time_is_over_ends_where_it_is(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, count = Clock(monkeypatch), 0

    def listen(event: Any) -> None:
        nonlocal count
        count += isinstance(event, TextDelta)
        clock.now += 1.0

    with Scheduler(runtime, 2) as scheduler:
        handle = scheduler.submit(request(runtime, [5, 6], max_tokens=100, limits={"deadline": 4.0}), listen)
        with pytest.raises(DeadlineError, match=r"within 4\.0 seconds") as caught:
            handle.result(WAIT)
        with pytest.raises(DeadlineError):
            list(handle)
        other = scheduler.submit(request(runtime, [5, 6], max_tokens=3, limits={"deadline": 4.0}))
        assert other.result(WAIT).finish_reason == "length"
        assert scheduler.metrics().requests["deadline"] == 1
    assert caught.value.generation.finish_reason == "deadline"
    assert len(caught.value.generation.token_ids) == count == 4


def test_a_deadline_counts_from_submission_so_it_may_pass_in_the_queue(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, gate = Clock(monkeypatch), Gate()
    with Scheduler(runtime, 1) as scheduler:
        scheduler.submit(request(runtime, [5], max_tokens=50), gate)
        assert gate.reached.wait(WAIT)
        handle = scheduler.submit(request(runtime, [6], max_tokens=5, limits={"deadline": 2.0}))
        clock.now += 3.0
        gate.opened.set()
        with pytest.raises(DeadlineError) as caught:
            handle.result(WAIT)
    assert caught.value.generation.token_ids == ()


# What is counted


def test_the_metrics_count_what_happened(runtime: Runtime) -> None:
    with Scheduler(runtime, 3) as scheduler:
        before = scheduler.metrics()
        assert (before.waiting, before.running, before.slots) == (0, 0, 3)
        assert before.state_bytes == runtime.state_bytes(3)
        for loops in (1, 4, 4):
            scheduler.submit(request(runtime, [5, 6, 7], max_tokens=5, loops=loops)).result(WAIT)
        after = scheduler.metrics()
    assert after.requests == {
        "stop": 0,
        "length": 3,
        "cancelled": 0,
        "deadline": 0,
        "failed": 0,
        "refused": 0,
    }
    assert (after.prompt_tokens, after.generated_tokens) == (9, 15)
    assert after.depth == {1: 5, 4: 10}
    assert (after.first_token.count, after.inter_token.count) == (3, 12)
    assert len(after.first_token.counts) == len(after.first_token.bounds) + 1
    assert after.first_token.total > 0
    assert after.weights_bytes > 0
    assert after.running == 0
