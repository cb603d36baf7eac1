"""Parts of the server by themselves: the metrics' page, keys, and grammars that a package cannot have."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import Counter
from pathlib import Path

import pytest
from melt_runtime import ArgumentError, Generation, Request, Runtime, Scheduler
from melt_runtime.scheduler.metrics import OUTCOMES, Histogram, SchedulerMetrics
from melt_runtime.server import app as app_module
from melt_runtime.server.grammar import Grammars
from melt_runtime.server.guard import Keys
from melt_runtime.server.metrics import prometheus
from melt_runtime.server.streaming import Backlog, Feed
from prometheus_client.parser import text_string_to_metric_families
from serving import eventually


def test_buckets_are_cumulative_and_depths_counted_together_have_no_bound() -> None:
    times = Histogram((0.1, 1.0), (2, 3, 4), 30.5)
    page = prometheus(
        SchedulerMetrics(1, 2, 4, dict.fromkeys(OUTCOMES, 0), 7, 9, {2: 5, 4: 3, 64: 1}, times, times, 100, 200, 3, 48),
        unread=17,
    )
    lines = [line.removesuffix(".0") for line in page.splitlines()]
    for line in (
        "# HELP melt_requests_total Requests that ended, by outcome.",
        "# TYPE melt_requests_total counter",
        'melt_requests_total{outcome="refused"} 0',
        "# TYPE melt_first_token_seconds histogram",
        "# TYPE melt_unread_tokens gauge",
        'melt_first_token_seconds_bucket{le="0.1"} 2',
        'melt_first_token_seconds_bucket{le="1"} 5',
        'melt_first_token_seconds_bucket{le="+Inf"} 9',
        "melt_first_token_seconds_sum 30.5",
        "melt_prefix_hits_total 3",
        "melt_prefix_tokens_total 48",
        "melt_unread_tokens 17",
        'melt_depth_loops_bucket{le="2"} 5',
        'melt_depth_loops_bucket{le="4"} 8',
        'melt_depth_loops_bucket{le="+Inf"} 9',
        "melt_depth_loops_sum 86",
    ):
        assert line in lines
    assert not any('le="64"' in line for line in lines)
    assert page.endswith("\n")
    families = {family.name: family.type for family in text_string_to_metric_families(page)}
    assert all(name.startswith(("melt_", "process_")) for name in families)  # nothing of Python's garbage collector
    assert Counter(kind for name, kind in families.items() if name.startswith("melt_")) == {
        "gauge": 8,
        "counter": 9,
        "histogram": 5,
    }


def test_keys_come_from_variable_and_file_together(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first\n\n second \n")
    keys = Keys.read("third, fourth", tmp_path / "keys")
    assert all(keys.admit(f"Bearer {key}".encode()) for key in ("first", "second", "third", "fourth"))
    assert not any(keys.admit(given) for given in (b"", b"Bearer", b"Bearer fifth", b"first", b"Basic first"))


def test_no_keys_let_everybody_in() -> None:
    assert Keys.read(None, None).admit(b"")


def test_json_needs_a_tokenizer(tiny_package_without_tokenizer: Path) -> None:
    with pytest.raises(ArgumentError, match="needs a tokenizer"):
        Grammars(Runtime.load(tiny_package_without_tokenizer))


def test_only_tokens_that_the_schema_allows_may_come(tiny_package: Path) -> None:
    runtime = Runtime.load(tiny_package)
    constraint = Grammars(runtime).constraint({"type": "integer"})
    tokenizer = runtime.tokenizer
    assert tokenizer is not None
    allowed = {tokenizer.decode([i]) for i in constraint.mask([]).nonzero()[0].tolist()}
    assert set("0123456789") <= allowed
    assert not allowed & set("abcxyz")


def test_grammars_are_gone_with_their_call_before_any_collection(tiny_package: Path) -> None:
    runtime = Runtime.load(tiny_package)
    constraints = Grammars(runtime).constraints({"type": "integer"}, 6)
    alive = [weakref.ref(one) for one in constraints]
    prompt, options = tuple(runtime.encode("abc")), runtime.options(max_tokens=4)
    requests = [Request(prompt, options, constraint=one) for one in constraints]
    del constraints

    async def read(scheduler: Scheduler, requests: list[Request]) -> int:
        feed = Feed(scheduler, requests, Backlog(1000))
        ends = [event async for _, event in feed if isinstance(event, Generation)]
        feed.close()
        return len(ends)

    gc.disable()
    try:
        with Scheduler(runtime, 2) as scheduler:
            assert asyncio.run(read(scheduler, requests)) == 6
            requests.clear()
            eventually(lambda: not any(one() for one in alive))
    finally:
        gc.enable()


def test_a_scheduler_says_whether_it_takes_requests(tiny_package: Path) -> None:
    with Scheduler(Runtime.load(tiny_package), 1) as scheduler:
        assert scheduler.open
    assert not scheduler.open


def test_freed_memory_is_returned_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = list[int]()
    monkeypatch.setattr(app_module, "_TRIM_SECONDS", 0.0)
    monkeypatch.setattr(app_module, "trim_memory", lambda: returned.append(1))

    async def until_twice() -> None:
        trimming = asyncio.create_task(app_module._trim())
        while len(returned) < 2:
            await asyncio.sleep(0.001)
        trimming.cancel()

    asyncio.run(asyncio.wait_for(until_twice(), 60))
