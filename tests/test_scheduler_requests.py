"""What may be asked of a scheduler, what a request gets for it, and what is refused at the door."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import (
    ArgumentError,
    BusyError,
    ClosedError,
    LoopDriver,
    LoopSettings,
    PromptError,
    Request,
    Runtime,
    Scheduler,
)
from test_scheduler import WAIT, Gate, request


@pytest.fixture(scope="module")
def runtime(tiny_package: Path) -> Runtime:
    return Runtime.load(tiny_package)


# At the door


def test_a_full_queue_says_when_to_come_again(runtime: Runtime) -> None:
    gate = Gate()
    with Scheduler(runtime, 1, max_waiting=1) as scheduler:
        scheduler.submit(request(runtime, [5], max_tokens=2), gate)
        assert gate.reached.wait(WAIT)
        waiting = scheduler.submit(request(runtime, [6], max_tokens=2))
        with pytest.raises(BusyError, match="all 1 slots are taken and 1 requests wait") as caught:
            scheduler.submit(request(runtime, [7], max_tokens=2))
        assert caught.value.retry_after > 0
        gate.opened.set()
        waiting.result(WAIT)
        assert scheduler.submit(request(runtime, [7], max_tokens=2)).result(WAIT).finish_reason == "length"
        assert scheduler.metrics().requests["refused"] == 1


def test_without_a_queue_a_free_slot_still_takes_a_request(runtime: Runtime) -> None:
    with Scheduler(runtime, 1, max_waiting=0) as scheduler:
        assert scheduler.submit(request(runtime, [7], max_tokens=2)).result(WAIT).finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ((), "empty"),
        ((5,) * 257, "room for 256"),
        ((50,), "outside the vocabulary"),
        ((-1,), "outside"),
        ((1.5,), "whole"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_at_the_door(runtime: Runtime, prompt: Any, words: str) -> None:
    with Scheduler(runtime, 1) as scheduler, pytest.raises(PromptError, match=words):
        scheduler.submit(Request(prompt, runtime.options()))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"deadline": 0}, "deadline is 0"),
        ({"deadline": float("inf")}, "deadline is inf"),
        ({"deadline": "soon"}, "deadline is 'soon'"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": True}, "logprobs is True"),
    ],
)
def test_limits_that_make_no_sense_are_refused_at_the_door(runtime: Runtime, limits: Any, words: str) -> None:
    with Scheduler(runtime, 1) as scheduler, pytest.raises(ArgumentError, match=words):
        scheduler.submit(request(runtime, [5], limits=limits))


@pytest.mark.parametrize("arguments", [{"slots": 0}, {"slots": 9}, {"max_waiting": -1}, {"max_waiting": 1.5}])
def test_a_scheduler_that_makes_no_sense_is_refused(runtime: Runtime, arguments: Any) -> None:
    with pytest.raises(ArgumentError):
        Scheduler(runtime, **arguments)


def test_what_the_package_cannot_run_is_refused_at_the_door(
    tiny_package_without_tokenizer: Path, make_looplm: MakeCheckpoint, make_package: MakePackage
) -> None:
    plain = Runtime.load(tiny_package_without_tokenizer)
    with Scheduler(plain, 1) as scheduler:
        with pytest.raises(ArgumentError, match="stop strings need a tokenizer"):
            scheduler.submit(request(plain, [5], stop="x"))
        with pytest.raises(ArgumentError, match="chunk is 9"):
            scheduler.submit(request(plain, [5], chunk=9))
        with pytest.raises(ArgumentError, match="GenerationOptions"):
            scheduler.submit(Request((5,), {"loops": 4}))  # type: ignore[arg-type]
    looplm = Runtime.load(make_package(make_looplm(), chunk=8))
    options = plain.options(loops=5)
    with Scheduler(looplm, 1) as scheduler, pytest.raises(ArgumentError, match="caches for 4"):
        scheduler.submit(Request((5,), options))


def test_a_closed_scheduler_takes_nothing(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime, 1)
    scheduler.close()
    scheduler.close()
    with pytest.raises(ClosedError):
        scheduler.submit(request(runtime, [5]))


# What a request may ask for


def test_logprobs_are_the_models_own(runtime: Runtime) -> None:
    prompt = [5, 6, 7]
    with Scheduler(runtime, 2) as scheduler:
        asked = request(runtime, prompt, max_tokens=3, temperature=1.5, seed=1, limits={"logprobs": 4})
        deltas = list(scheduler.submit(asked))
    driver = runtime.driver()
    for delta in deltas:
        logits = driver.append([prompt], LoopSettings(4))[0].astype(np.float64)
        expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        order = np.argsort(-expected)[:4]
        assert delta.logprobs is not None
        assert [token for token, _ in delta.logprobs.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in delta.logprobs.top], expected[order], atol=1e-5)
        np.testing.assert_allclose(delta.logprobs.token, expected[delta.token_id], atol=1e-5)
        prompt = [delta.token_id]


def test_no_alternatives_still_gives_the_tokens_own_logprob(runtime: Runtime) -> None:
    with Scheduler(runtime, 1) as scheduler:
        (one,) = scheduler.submit(request(runtime, [5], max_tokens=1, limits={"logprobs": 0}))
        (none,) = scheduler.submit(request(runtime, [5], max_tokens=1))
    assert one.logprobs is not None
    assert one.logprobs.top == ()
    assert one.logprobs.token < 0
    assert none.logprobs is None


class Alternate:
    """Even tokens and odd ones in turn, from the third on anything."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self, history: Sequence[int]) -> np.ndarray | None:
        assert list(history) == self.accepted
        return None if len(history) >= 3 else np.arange(50) % 2 == len(history) % 2

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_constraint_is_kept_and_told_and_nobody_elses(runtime: Runtime, temperature: float) -> None:
    free = runtime.generate([5, 6, 7], max_tokens=6, ignore_eos=True)
    constraint = Alternate()
    with Scheduler(runtime, 2) as scheduler:
        asked = request(
            runtime, [5, 6, 7], max_tokens=6, temperature=temperature, seed=2, limits={"constraint": constraint}
        )
        bound, other = scheduler.submit(asked), scheduler.submit(request(runtime, [5, 6, 7], max_tokens=6))
        tokens = bound.result(WAIT).token_ids
        assert other.result(WAIT) == free
    assert [token % 2 for token in tokens[:3]] == [0, 1, 0]
    assert constraint.accepted == list(tokens)


class Kept:
    """Prompts' first chunks: put back by running them again, which is slow and right."""

    def __init__(self) -> None:
        self.known: set[tuple[int, ...]] = set()
        self.restored = self.bytes = 0

    def claim(self, driver: LoopDriver) -> None:
        assert driver.batch == 2

    def restore(self, driver: LoopDriver, slot: int, prompt: Sequence[int], settings: LoopSettings) -> int:
        if tuple(prompt[:8]) not in self.known or len(prompt) <= 8:
            return 0
        part = driver.part(slot, 1)
        assert part is not None
        part.append([prompt[:8]], settings)
        self.restored += 8
        return 8

    def keep(self, driver: LoopDriver, slot: int, prompt: Sequence[int], settings: LoopSettings) -> None:
        assert driver.lengths[slot] == len(prompt)
        self.known.add(tuple(prompt[:8]))


def test_a_known_beginning_of_a_prompt_is_put_back_and_the_rest_runs(runtime: Runtime) -> None:
    prefixes, shared = Kept(), list(range(3, 12))
    with Scheduler(runtime, 2, prefixes=prefixes) as scheduler:
        for end in ([20, 21], [30], [31] * 9):
            result = scheduler.submit(request(runtime, shared + end, max_tokens=6)).result(WAIT)
            assert result == runtime.generate(shared + end, max_tokens=6, ignore_eos=True)
            assert result.cached_tokens == (0 if end == [20, 21] else 8)
        counted = scheduler.metrics()
        assert (counted.prompt_tokens, counted.prefix_hits, counted.prefix_tokens) == (11 + 2 + 10, 2, 16)
    assert prefixes.restored == 16
