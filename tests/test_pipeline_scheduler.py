"""Requests that a scheduler decodes pipelined get the answers that they get alone, whoever comes and goes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import ArgumentError, MeltError, PrefixCache, Request, Runtime, Scheduler
from melt_runtime.backends.positions import CachedPositions
from melt_runtime.scheduler.slots import Slots

PROMPTS = [
    [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9],
    [5, 6],
    [9, 9, 9, 1],
    [40, 2, 7],
    [12, 13, 14, 15, 16, 17, 18, 19, 20],
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"loops": 3},
    {"repetition_penalty": 1.2, "frequency_penalty": 1.0, "logit_bias": {3: 2.5}},
    {"loops": 1},
]


@pytest.fixture(scope="module", params=["onnxruntime", "standard", "portable"])
def runtime(make_package: MakePackage, make_looplm: MakeCheckpoint, request: pytest.FixtureRequest) -> Runtime:
    return Runtime.load(make_package(make_looplm(), chunk=4, max_seq_len=128, dialect=request.param))


def asked(which: int, **options: Any) -> dict[str, Any]:
    return {"ignore_eos": True, "max_tokens": 10 + 9 * which, **OPTIONS[which], **options}


@pytest.mark.parametrize("pipeline", ["on", "auto"])
def test_requests_that_come_and_go_get_their_answers(runtime: Runtime, pipeline: str) -> None:
    alone = [runtime.generate(prompt, **asked(which, pipeline="off")) for which, prompt in enumerate(PROMPTS)]
    with Scheduler(runtime, slots=3, prefixes=PrefixCache(1 << 24)) as scheduler:
        for _ in range(2):
            handles = [
                scheduler.submit(Request(tuple(prompt), runtime.options(**asked(which, pipeline=pipeline))))
                for which, prompt in enumerate(PROMPTS)
            ]
            results = [handle.result() for handle in handles]
            assert results == alone
        metrics = scheduler.metrics()
    if pipeline == "on":
        assert all(result.pipeline is not None for result in results[2:4])
        assert metrics.pipeline_tokens > 100
        assert metrics.pipeline_runs > 0
        assert sum(metrics.drafts_held) + sum(metrics.drafts_dropped) > 0


def test_a_lone_request_goes_on_while_others_visit(runtime: Runtime) -> None:
    """The long request's caches are moved apart for each visitor, and together after it."""
    long = {"max_tokens": 100, "ignore_eos": True, "temperature": 0.7, "seed": 1}
    alone = runtime.generate(PROMPTS[0], pipeline="off", **long)
    visits = [runtime.generate(prompt, max_tokens=4, pipeline="off", ignore_eos=True) for prompt in PROMPTS[1:]]
    arrived = threading.Semaphore(0)
    with Scheduler(runtime, slots=2) as scheduler:
        first = scheduler.submit(Request((5,), runtime.options(max_tokens=3, pipeline="on", ignore_eos=True)))
        handle = scheduler.submit(
            Request(tuple(PROMPTS[0]), runtime.options(pipeline="on", **long)), lambda event: arrived.release()
        )
        first.result()
        for prompt, expected in zip(PROMPTS[1:], visits, strict=True):
            for _ in range(12):
                arrived.acquire()
            options = runtime.options(max_tokens=4, pipeline="on", ignore_eos=True)
            assert scheduler.submit(Request(tuple(prompt), options)).result() == expected
        result = handle.result()
    assert result == alone
    assert result.pipeline is not None
    assert result.pipeline.tokens > 50


def test_a_request_whose_caches_could_not_be_moved_fails_and_later_ones_do_not(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another request's arrival moves the caches apart; without memory in the middle of it they are undefined."""
    moved, left, arrived = CachedPositions._move, [1_000], threading.Semaphore(0)

    def failing(self: CachedPositions, *arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError
        moved(self, *arguments)

    monkeypatch.setattr(CachedPositions, "_move", failing)
    options = runtime.options(max_tokens=90, ignore_eos=True, pipeline="on")
    with Scheduler(runtime, slots=2) as scheduler:
        first = scheduler.submit(Request(tuple(PROMPTS[0]), options), lambda event: arrived.release())
        for _ in range(10):
            arrived.acquire()
        left[0] = 3
        second = scheduler.submit(Request((5, 6), options))
        for handle in (first, second):
            with pytest.raises(MeltError, match="MemoryError"):
                handle.result()
        result = scheduler.submit(Request(tuple(PROMPTS[0]), options)).result()
    assert result == runtime.generate(PROMPTS[0], max_tokens=90, ignore_eos=True, pipeline="off")


def test_a_request_that_cannot_be_pipelined_is_refused(
    make_package: MakePackage, make_looplm: MakeCheckpoint, tiny_package: Path
) -> None:
    single = make_package(make_looplm(), chunk=8, dialect="standard", max_batch=1)
    runtime = Runtime.load(single)
    with Scheduler(runtime) as scheduler:
        handle = scheduler.submit(Request((1, 2), runtime.options(pipeline="on")))
        with pytest.raises(ArgumentError, match="--max-batch 1"):
            handle.result()
        assert scheduler.submit(Request((1, 2), runtime.options(max_tokens=3))).result().pipeline is None


class Walk:
    """A constraint whose allowed tokens change with every token. It fills one array again and again."""

    def __init__(self, vocab: int):
        self.accepted: list[int] = []
        self._mask = np.zeros(vocab, np.bool_)

    def mask(self, history: Sequence[int]) -> np.ndarray:
        return self._after(history)

    def mask_ahead(self, ahead: Sequence[int]) -> np.ndarray | None:
        tokens = [*self.accepted, *ahead]
        if not all(self._after(tokens[:at])[tokens[at]] for at in range(len(self.accepted), len(tokens))):
            return None
        return self._after(tokens)

    def accept(self, token: int) -> None:
        assert self._after(self.accepted)[token]
        self.accepted.append(token)

    def _after(self, tokens: Sequence[int]) -> np.ndarray:
        shift = len(tokens) ** 2 + 3 * (tokens[-1] if tokens else 0)
        self._mask[:] = (np.arange(len(self._mask)) + shift) % 3 == 0
        return self._mask


def test_a_constraint_may_fill_one_array_again_and_again(runtime: Runtime) -> None:
    def answer(pipeline: str) -> Any:
        options = runtime.options(max_tokens=30, ignore_eos=True, pipeline=pipeline)
        return scheduler.submit(Request((1, 2, 3), options, constraint=Walk(runtime.manifest.vocab_size))).result()

    with Scheduler(runtime, slots=1) as scheduler:
        plain, piped = answer("off"), answer("on")
    assert piped == plain
    assert sum(piped.pipeline.held) > 0


class Limited:
    """A constraint that allows every token, and raises after 12 of them."""

    count = 0

    def mask(self, history: Sequence[int]) -> None:
        return None

    def accept(self, token: int) -> None:
        self.count += 1
        if self.count > 12:
            raise ZeroDivisionError("grammar")


@pytest.mark.parametrize("fault", ["constraint", "listener", "scheduler"])
def test_the_tokens_of_a_request_that_fails_are_counted_as_pipelined(
    runtime: Runtime, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[object] = []

    def listener(event: object) -> None:
        heard.append(event)
        if fault == "listener" and len(heard) > 12:
            raise ZeroDivisionError("listener")

    def end(self: Slots, *arguments: Any) -> None:
        raise AssertionError("a bug")

    if fault == "scheduler":
        monkeypatch.setattr(Slots, "end", end)
    options = runtime.options(max_tokens=13 if fault == "scheduler" else 60, ignore_eos=True, pipeline="on")
    constraint = Limited() if fault == "constraint" else None
    scheduler = Scheduler(runtime, slots=2)
    handle = scheduler.submit(Request(tuple(PROMPTS[0]), options, constraint=constraint), listener)
    with pytest.raises(MeltError):
        handle.result(60)
    metrics = scheduler.metrics()
    scheduler.close()
    assert metrics.requests["failed"] == 1
    assert metrics.pipeline_tokens == 12  # the prompt gives the first of 13
    assert metrics.pipeline_runs >= 12
