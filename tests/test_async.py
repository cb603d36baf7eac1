"""Generating from coroutines: the same results, while the event loop goes on, and an end when a task is cancelled."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
from melt_runtime import (
    ArgumentError,
    CancelledError,
    DeadlineError,
    Generation,
    PromptError,
    Request,
    RequestHandle,
    Runtime,
    Scheduler,
)
from melt_runtime.decoding.generator import TokenSequence

LIMIT = 120.0  # seconds; a hang limit
GO_ON: Any = {"ignore_eos": True}


@pytest.fixture
def runtime(served_package: Path) -> Runtime:
    return Runtime.load(served_package, threads=1)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that all calls have sampled so far."""
    tokens: list[int] = []
    sample = TokenSequence.sample

    def counted(self: TokenSequence, *arguments: Any) -> Any:
        delta = sample(self, *arguments)
        tokens.append(delta.token_id)
        return delta

    monkeypatch.setattr(TokenSequence, "sample", counted)
    return tokens


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, LIMIT))


def test_awaited_results_are_those_of_generate(runtime: Runtime) -> None:
    async def work() -> tuple[Generation, list[Generation], list[Generation]]:
        one = await runtime.agenerate("abc", max_tokens=20, **GO_ON)
        several = await runtime.agenerate(["abc", "de"], max_tokens=20, temperature=1, seed=3, **GO_ON)
        return one, several, await asyncio.gather(*(runtime.agenerate("abc" * n, max_tokens=9) for n in range(1, 5)))

    one, several, gathered = run(work())
    assert one == runtime.generate("abc", max_tokens=20, **GO_ON)
    assert several == runtime.generate(["abc", "de"], max_tokens=20, temperature=1, seed=3, **GO_ON)
    assert gathered == [runtime.generate("abc" * n, max_tokens=9) for n in range(1, 5)]


def test_awaited_streams_give_the_text_also_side_by_side(runtime: Runtime) -> None:
    async def read(prompt: str) -> str:
        return "".join([delta async for delta in runtime.astream(prompt, max_tokens=30, **GO_ON)])

    async def work() -> list[str]:
        return await asyncio.gather(read("abc"), read("xyz"), read("Hello"))

    assert run(work()) == [runtime.generate(prompt, max_tokens=30, **GO_ON).text for prompt in ("abc", "xyz", "Hello")]


def test_the_event_loop_goes_on_meanwhile(runtime: Runtime) -> None:
    async def work() -> tuple[int, int]:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.create_task(count())
        await runtime.agenerate("abc", max_tokens=50, **GO_ON)
        first = turns
        async for _ in runtime.astream("abc", max_tokens=50, **GO_ON):
            pass
        counting.cancel()
        return first, turns - first

    assert min(run(work())) > 50


def test_a_cancelled_call_ends_at_its_next_token_and_one_that_waits_does_not_begin(
    runtime: Runtime, sampled: list[int]
) -> None:
    async def work() -> int:
        long, waiting = (
            asyncio.create_task(runtime.agenerate(prompt, max_tokens=8000, **GO_ON)) for prompt in ("abc", "xyz")
        )
        while len(sampled) < 5:
            await asyncio.sleep(0.001)
        for task in (waiting, long):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        before = len(sampled)
        await runtime.agenerate("de", max_tokens=4, **GO_ON)
        return len(sampled) - before

    assert run(work()) < 4 + 100  # of 16,000; some may have been sampled between cancelling and counting


def test_a_cancelled_or_closed_stream_ends_and_frees_its_state(runtime: Runtime, sampled: list[int]) -> None:
    async def read() -> None:
        async for _ in runtime.astream("abc", max_tokens=8000, **GO_ON):
            pass

    async def work() -> None:
        task = asyncio.create_task(read())
        while len(sampled) < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with aclosing(runtime.astream("xyz", max_tokens=8000, **GO_ON)) as deltas:
            async for _ in deltas:
                break
        while runtime._states._leases:
            await asyncio.sleep(0.001)

    run(work())
    assert len(sampled) < 500


def test_errors_come_to_the_awaiting_task(runtime: Runtime) -> None:
    async def work() -> None:
        with pytest.raises(PromptError):
            await runtime.agenerate("")
        with pytest.raises(ArgumentError, match="did you mean"):
            await runtime.agenerate("abc", max_tokns=5)  # type: ignore[call-overload]
        with pytest.raises(ArgumentError):
            runtime.astream("abc", temperature=-1)  # at the call
        assert (await runtime.agenerate("abc", max_tokens=3, **GO_ON)).token_ids

    run(work())


def test_several_event_loops_may_use_one_runtime_after_another(runtime: Runtime) -> None:
    expected = runtime.generate("abc", max_tokens=5, **GO_ON)
    for _ in range(3):
        assert run(runtime.agenerate("abc", max_tokens=5, **GO_ON)) == expected


def test_a_session_of_its_own_is_not_needed_and_not_disturbed(runtime: Runtime) -> None:
    session = runtime.session(max_tokens=5, **GO_ON)
    session.append("abc")
    run(runtime.agenerate("xyz", max_tokens=9, **GO_ON))
    assert session.generate().text == runtime.generate("abc", max_tokens=5, **GO_ON).text


def test_requests_to_a_scheduler_are_awaited_together(runtime: Runtime) -> None:
    prompts = ["abc", "xyz", "Hello", "de"]

    async def read(scheduler: Scheduler, prompt: str) -> tuple[str, Generation]:
        request = Request(tuple(runtime.encode(prompt)), runtime.options(max_tokens=20, **GO_ON))
        handle = scheduler.submit(request)
        text = "".join([delta.text async for delta in handle])
        return text, await handle.aresult()

    async def work() -> list[tuple[str, Generation]]:
        with Scheduler(runtime, 4) as scheduler:
            return await asyncio.gather(*(read(scheduler, prompt) for prompt in prompts))

    expected = [runtime.generate(prompt, max_tokens=20, **GO_ON) for prompt in prompts]
    assert run(work()) == [(one.text, one) for one in expected]


@pytest.mark.parametrize("way", ["stream", "result", "left"])
def test_a_request_is_cancelled_with_the_task_that_awaits_it(runtime: Runtime, sampled: list[int], way: str) -> None:
    async def read(handle: RequestHandle) -> None:
        if way == "result":
            await handle.aresult()
        async for _ in handle:
            if way == "left":
                break

    async def work() -> str:
        with Scheduler(runtime, 1) as scheduler:
            handle = scheduler.submit(Request((5, 6), runtime.options(max_tokens=4000, **GO_ON)))
            task = asyncio.create_task(read(handle))
            while len(sampled) < 5 and way != "left":
                await asyncio.sleep(0.001)
            if way != "left":
                task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            while not handle.done:
                await asyncio.sleep(0.001)
            with pytest.raises(CancelledError) as caught:
                await handle.aresult()
            return caught.value.generation.finish_reason

    assert run(work()) == "cancelled"


def test_an_awaited_request_raises_what_ended_it(runtime: Runtime) -> None:
    async def work() -> None:
        with Scheduler(runtime, 1) as scheduler:
            options = runtime.options(max_tokens=4000, **GO_ON)
            with pytest.raises(DeadlineError):
                await scheduler.submit(Request((5, 6), options, deadline=0.05)).aresult()
            with pytest.raises(DeadlineError):
                async for _ in scheduler.submit(Request((5, 6), options, deadline=0.05)):
                    pass

    run(work())
