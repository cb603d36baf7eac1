"""Pipelined decoding of a MELT, whose loops share a cache, is the staggered decoding that PyTorch defines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakePackage
from melt_models.checkpoint import load_model
from melt_models.decoding import greedy_tokens
from melt_models.melt import MeltForCausalLM
from melt_runtime import Request, Runtime, Scheduler
from melt_runtime.decoding.generator import TokenSequence
from melt_runtime.decoding.loop_driver import LoopDriver

PROMPTS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9], [5, 6], [40, 2, 7, 7], [1]]


@pytest.fixture(scope="module", params=["onnxruntime", "standard", "portable"])
def package(make_package: MakePackage, make_checkpoint: MakeCheckpoint, request: pytest.FixtureRequest) -> Any:
    return make_package(make_checkpoint(), chunk=8, dialect=request.param)


@pytest.fixture(scope="module")
def runtime(package: Any) -> Runtime:
    return Runtime.load(package)


@pytest.fixture(scope="module")
def model(make_checkpoint: MakeCheckpoint) -> MeltForCausalLM:
    loaded = load_model(make_checkpoint(), dtype=torch.float32)
    assert isinstance(loaded, MeltForCausalLM)
    return loaded.eval()


@pytest.mark.parametrize("loops", [2, 3, 4])
def test_tokens_and_runs_are_those_of_pytorch(runtime: Runtime, model: MeltForCausalLM, loops: int) -> None:
    for prompt in PROMPTS:
        expected = greedy_tokens(
            model,
            prompt,
            24,
            decode="staggered",
            num_loops=loops,
            chunk_size=8,
            lanes=min(loops, runtime.manifest.loops),
        )
        found = runtime.generate(prompt, loops=loops, max_tokens=24, ignore_eos=True, pipeline="on", exit_threshold=1.0)
        assert list(found.token_ids) == expected.tokens
        assert found.pipeline is not None
        assert found.pipeline.runs == expected.runs


def test_it_must_be_asked_for(runtime: Runtime) -> None:
    """Its tokens may be others than those of plain decoding."""
    asked: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True}
    assert runtime.generate(PROMPTS[0], **asked).pipeline is None
    assert runtime.generate(PROMPTS[0], pipeline="auto", **asked) == runtime.generate(
        PROMPTS[0], pipeline="off", **asked
    )


def test_a_token_that_leaves_early_arrives_earlier(runtime: Runtime) -> None:
    asked: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "pipeline": "on", "loops": 4}
    full = runtime.generate(PROMPTS[0], exit_threshold=1.0, **asked)
    early = runtime.generate(PROMPTS[0], exit_threshold=0.5, **asked)
    none = runtime.generate(PROMPTS[0], exit_threshold=0.0, **asked)
    assert full.pipeline is not None
    assert early.pipeline is not None
    assert none.pipeline is not None
    assert set(full.depth) == {4}
    assert set(none.depth[len(PROMPTS[0]) :]) == {1}
    assert none.pipeline.runs == none.pipeline.tokens
    assert early.pipeline.runs <= full.pipeline.runs
    plain = runtime.generate(PROMPTS[0], exit_threshold=0.0, **{**asked, "pipeline": "off"})
    assert none == plain


def test_a_session_holds_final_tokens_only(runtime: Runtime) -> None:
    """What follows a pipelined answer reads the caches that its tokens left."""
    session = runtime.session(ignore_eos=True, max_tokens=7, pipeline="on")
    session.append(PROMPTS[0])
    first = session.generate()
    whole = runtime.generate(PROMPTS[0], ignore_eos=True, max_tokens=7, pipeline="on")
    assert first.token_ids == whole.token_ids
    branch = session.fork()
    assert branch.generate(pipeline="off").token_ids == session.generate(pipeline="off").token_ids


def test_the_tokens_in_flight_leave_nothing_to_plain_decoding(runtime: Runtime) -> None:
    """After a change of the sequence the state is as if nothing had been in flight."""
    from melt_runtime.decoding.pipeline import Pipelining
    from melt_runtime.decoding.settings import LoopSettings

    settings = LoopSettings(runtime.manifest.loops)

    def tokens(driver: LoopDriver, pipelined: bool) -> np.ndarray:
        token = int(driver.append([PROMPTS[0]], settings)[0].argmax())
        how = Pipelining(lambda logits, ahead: int(logits.argmax())) if pipelined else None
        for _ in range(5):
            token = int(driver.advance([[token]], settings, pipelining=how).row(0).argmax())
        driver.truncate(0, 0)
        driver.append([PROMPTS[2]], settings)
        return driver.append([[9]], settings)[0]

    np.testing.assert_array_equal(tokens(runtime.driver(), True), tokens(runtime.driver(), False))


def test_a_scheduler_of_one_slot_gives_the_same_tokens(runtime: Runtime) -> None:
    options = runtime.options(max_tokens=12, ignore_eos=True, pipeline="on")
    with Scheduler(runtime, slots=1) as scheduler:
        handles = [scheduler.submit(Request(tuple(prompt), options)) for prompt in PROMPTS]
        found = [handle.result() for handle in handles]
    for prompt, result in zip(PROMPTS, found, strict=True):
        assert result == runtime.generate(prompt, max_tokens=12, ignore_eos=True, pipeline="on")


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "seed": 5}, {"exit_kl": 0.002}, {"exit_change": 0.9}, {"loops": 3}], ids=str
)
def test_requests_that_share_runs_get_what_they_get_alone(runtime: Runtime, options: dict[str, Any]) -> None:
    """Staggered and plain requests of different lengths come and go in three slots."""
    asked = [
        {"max_tokens": 9 + 7 * which, "ignore_eos": True, "pipeline": "off" if which == 1 else "on", **options}
        for which in range(5)
    ]
    prompts = [*PROMPTS, PROMPTS[0][:6]]
    alone = [runtime.generate(prompt, **one) for prompt, one in zip(prompts, asked, strict=True)]
    with Scheduler(runtime, slots=3) as scheduler:
        for _ in range(2):
            handles = [
                scheduler.submit(Request(tuple(prompt), runtime.options(**one)))
                for prompt, one in zip(prompts, asked, strict=True)
            ]
            found = [handle.result() for handle in handles]
            assert found == alone
            for result, single in zip(found, alone, strict=True):
                assert result.pipeline == single.pipeline


def test_the_end_of_a_cache_is_no_ones_elses(make_package: MakePackage, make_checkpoint: MakeCheckpoint) -> None:
    for dialect in ("onnxruntime", "standard", "portable"):
        runtime = Runtime.load(make_package(make_checkpoint(), chunk=4, max_seq_len=16, max_batch=3, dialect=dialect))
        asked: dict[str, Any] = {"max_tokens": 50, "ignore_eos": True, "pipeline": "on"}
        alone = [runtime.generate(prompt, **asked) for prompt in PROMPTS]
        with Scheduler(runtime, slots=3) as scheduler:
            handles = [scheduler.submit(Request(tuple(prompt), runtime.options(**asked))) for prompt in PROMPTS]
            assert [handle.result() for handle in handles] == alone


# Criteria by which some tokens of this model leave after one loop, and others do not.
CRITERIA: list[dict[str, Any]] = [
    {"exit_threshold": 0.5},
    {"exit_change": 0.9},
    {"exit_kl": 0.005},
    {"exit_same": 1},
    {"exit_entropy": 3.7},
    {"exit_margin": 0.02},
    {"exit_threshold": 0.7, "exit_kl": 0.002, "min_loops": 2},
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_over_two_loops_tokens_and_depths_are_those_of_plain_decoding(
    runtime: Runtime, criterion: dict[str, Any]
) -> None:
    """In its last two loops a token sees the one before it as plain decoding does."""
    for prompt in PROMPTS:
        asked = {"max_tokens": 24, "ignore_eos": True, "loops": 2, "exit_threshold": 1.0, **criterion}
        plain = runtime.generate(prompt, pipeline="off", **asked)
        piped = runtime.generate(prompt, pipeline="on", **asked)
        assert (piped.token_ids, piped.depth) == (plain.token_ids, plain.depth)


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_a_token_leaves_in_flight_by_what_it_would_leave_by_alone(
    runtime: Runtime, criterion: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without drafts a token is alone in flight, and the result is that of plain decoding at any depth."""
    monkeypatch.setattr(TokenSequence, "draft", lambda self, logits, ahead: None)
    depths = set[int]()
    for prompt in PROMPTS:
        asked = {"max_tokens": 24, "ignore_eos": True, "loops": 4, "exit_threshold": 1.0, **criterion}
        plain = runtime.generate(prompt, pipeline="off", **asked)
        piped = runtime.generate(prompt, pipeline="on", **asked)
        assert (piped.token_ids, piped.depth) == (plain.token_ids, plain.depth)
        assert piped.pipeline is not None
        assert piped.pipeline.runs == sum(piped.depth[len(prompt) :])
        depths |= set(piped.depth[len(prompt) :])
    assert depths & {1, 2, 3}


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_what_leaves_early_saves_runs(runtime: Runtime, criterion: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "pipeline": "on", "loops": 4}
    for prompt in PROMPTS:
        early = runtime.generate(prompt, **{"exit_threshold": 1.0, **asked, **criterion})
        assert early.pipeline is not None
        assert early.pipeline.tokens == 23
        assert early.pipeline.runs <= sum(early.depth[len(prompt) :])
