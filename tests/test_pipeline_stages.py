"""Pipelined decoding of models with layers outside their loops: the tokens of plain decoding, at every depth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAMILY_SIZES, MakeFamily, MakePackage
from melt_models.convert import convert
from melt_models.decoding import greedy_tokens
from melt_models.melt import MeltForCausalLM
from melt_runtime import ArgumentError, LoopSettings, PrefixCache, Request, Runtime, Scheduler
from melt_runtime.decoding.pipeline import PipelineCounts, Pipelining
from melt_runtime.package.specs import DIALECTS
from test_pipeline import greedy

from melt_export.checkpoint import Checkpoint
from melt_export.quantization.options import CacheOptions, WeightOptions

KINDS = ["huginn", "llama", "olmo", "nanbeige_skip"]
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
ASKED: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}


def prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(count)
    return [random.integers(0, 50, random.integers(1, 12)).tolist() for _ in range(count)]


@pytest.mark.parametrize("loops", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_plain_decoding_at_every_depth(
    kind: str, loops: int, make_family: MakeFamily, make_package: MakePackage
) -> None:
    field = "num_loops" if kind.startswith("nanbeige") else "mean_recurrence"
    runtime = Runtime.load(make_package(make_family(kind, **{field: 5}), **FAMILY_SIZES))
    for options in ({}, {"temperature": 1.2, "top_k": 9, "repetition_penalty": 1.1}, {"start_seed": 7}):
        if kind == "nanbeige_skip" and "start_seed" in options:
            continue
        for seed, prompt in enumerate(prompts(3)):
            asked = {**ASKED, **options, "loops": loops, "seed": seed}
            alone = runtime.generate(prompt, pipeline="off", **asked)
            piped = runtime.generate(prompt, pipeline="on", **asked)
            assert piped == alone
            assert alone.pipeline is None
            assert piped.pipeline is not None
            assert piped.pipeline.tokens == 19  # the prompt gives the first
            assert 19 + loops - 1 <= piped.pipeline.runs <= 19 * loops


PACKED: dict[str, dict[str, Any]] = {
    "standard": {"dialect": "standard"},
    "portable": {"dialect": "portable"},
    "portable-alone": {"dialect": "portable", "max_batch": 1},
    "standard-fp16": {"dialect": "standard", "precision": "fp16"},
    "fp16": {"precision": "fp16"},
    "weights-int4": {"weights": WeightOptions("int4", 32, method="rtn")},
    "weights-int8": {"weights": WeightOptions("int8", 32, embedding="int8")},
    "cache-int8": {"cache": CacheOptions("int8")},
    "cache-int4": {"cache": CacheOptions("int4")},
}


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("kind", ["huginn", "llama"])
def test_every_precision_and_cache_gives_plain_tokens(
    kind: str, options: dict[str, Any], make_runtime: Callable[..., Runtime]
) -> None:
    runtime = make_runtime(kind, **options)
    for prompt in prompts(4):
        assert runtime.generate(prompt, pipeline="on", **ASKED) == runtime.generate(prompt, pipeline="off", **ASKED)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_all_stages_hold_the_final_tokens_only(
    kind: str, dialect: str, make_runtime: Callable[..., Runtime]
) -> None:
    """Everything that a later call may read is as plain decoding leaves it, whatever drafts wrote before."""
    runtime = make_runtime(kind, dialect=dialect)
    settings = LoopSettings(runtime.manifest.loops)
    drivers = [runtime.driver(), runtime.driver()]
    token, _ = (int(driver.append([PROMPT], settings)[0].argmax()) for driver in drivers)
    for _ in range(12):
        piped = drivers[0].advance([[token]], settings, pipelining=Pipelining(greedy)).row(0)
        np.testing.assert_allclose(piped, drivers[1].append([[token]], settings)[0], rtol=1e-5, atol=1e-6)
        assert drivers[0].depth == drivers[1].depth
        length = int(drivers[0].lengths[0])
        kept = [driver.state.read_positions(0, 0, length) for driver in drivers]
        assert any(name.startswith("coda_") for name in kept[0]) or kind == "nanbeige_skip"
        for name, values in kept[0].items():
            np.testing.assert_allclose(values, kept[1][name], rtol=1e-5, atol=1e-6, err_msg=name)
        token = int(piped.argmax())


def test_drafts_are_read_by_the_coda(make_runtime: Callable[..., Runtime]) -> None:
    """Perfect drafts take one run per token, so their tokens ran the prelude once and their loops behind each other."""
    runtime = make_runtime("huginn")
    known = list(runtime.generate(PROMPT, pipeline="off", **ASKED).token_ids)
    driver, settings = runtime.driver(), LoopSettings(3)
    tokens = [int(driver.append([PROMPT], settings)[0].argmax())]
    assert driver.pipeline is not None
    counts = PipelineCounts(3)
    driver.pipeline.begin(0, counts)

    def draft(logits: np.ndarray, ahead: Any) -> int | None:
        place = len(tokens) + len(ahead)
        return known[place] if place < len(known) else None

    for _ in range(19):
        row = driver.advance([[tokens[-1]]], settings, pipelining=Pipelining(draft)).row(0)
        tokens.append(int(row.argmax()))
    assert tokens[:20] == known
    use = counts.use()
    assert use is not None
    assert use.runs == 19 + 3 - 1
    assert not any(use.dropped)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", ["huginn", "olmo", "nanbeige_skip"])
def test_requests_of_a_scheduler_are_pipelined_together(
    kind: str, dialect: str, make_runtime: Callable[..., Runtime]
) -> None:
    """Sequences have their own starts, depths and paces."""
    runtime = make_runtime(kind, dialect=dialect)
    most = runtime.manifest.loops
    asked: list[dict[str, Any]] = [
        {**ASKED, "max_tokens": 8 + 6 * which, "loops": 1 + (which + 1) % most} for which in range(5)
    ]
    if runtime.manifest.start:
        asked = [{**how, "start_seed": which} for which, how in enumerate(asked)]
    alone = [runtime.generate(p, pipeline="off", **how) for p, how in zip(prompts(5), asked, strict=True)]
    for pipeline in ("on", "auto"):
        with Scheduler(runtime, slots=3, prefixes=PrefixCache(1 << 24)) as scheduler:
            handles = [
                scheduler.submit(Request(tuple(prompt), runtime.options(pipeline=pipeline, **how)))
                for prompt, how in zip(prompts(5), asked, strict=True)
            ]
            assert [handle.result() for handle in handles] == alone
            if pipeline == "on":
                assert scheduler.metrics().pipeline_tokens > 0


def test_the_start_state_may_be_zeros_beside_noise(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime("huginn")
    each: list[dict[str, Any]] = [{"start_state": "zeros"}, {"start_seed": 3}, {}]
    alone = [runtime.generate(PROMPT, pipeline="off", **ASKED, **how) for how in each]
    assert len({answer.token_ids for answer in alone}) > 1
    assert [runtime.generate(PROMPT, pipeline="on", **ASKED, **how) for how in each] == alone
    with Scheduler(runtime, slots=3) as scheduler:
        options = [runtime.options(pipeline="on", **ASKED, **how) for how in each]
        handles = [scheduler.submit(Request(tuple(PROMPT), one)) for one in options]
        assert [handle.result() for handle in handles] == alone


def test_a_session_goes_on_after_pipelined_tokens_as_after_plain_ones(
    make_runtime: Callable[..., Runtime], tmp_path: Path
) -> None:
    runtime, answers = make_runtime("huginn"), []
    for pipeline in ("on", "off"):
        session = runtime.session(pipeline=pipeline, ignore_eos=True, max_tokens=7, temperature=0.9, seed=3)
        session.append(PROMPT)
        said = [session.generate().token_ids]
        branch = session.fork()
        session.rewind(3)
        said += [session.generate().token_ids, branch.generate().token_ids]
        branch.append([5, 6])
        branch.save(tmp_path / "saved.melt")
        said.append(runtime.load_session(tmp_path / "saved.melt").generate().token_ids)
        said += [session.tokens, session.depth, branch.tokens]
        answers.append(said)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_it_ends_at_the_last_position(dialect: str, make_family: MakeFamily, make_package: MakePackage) -> None:
    runtime = Runtime.load(make_package(make_family("huginn"), chunk=4, max_seq_len=16, dialect=dialect))
    piped = runtime.generate(PROMPT, pipeline="on", max_tokens=50, ignore_eos=True)
    assert piped.finish_reason == "length"
    assert piped == runtime.generate(PROMPT, pipeline="off", max_tokens=50, ignore_eos=True)


def test_more_loops_than_a_chunk_holds_are_pipelined_in_part(
    make_family: MakeFamily, make_package: MakePackage
) -> None:
    runtime = Runtime.load(make_package(make_family("huginn", mean_recurrence=6), chunk=2, max_seq_len=64))
    known = runtime.generate(PROMPT, pipeline="off", **ASKED)
    assert runtime.generate(PROMPT, pipeline="on", **ASKED) == known


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", ["huginn", "llama", "nanbeige", "nanbeige_skip", "melt"])
def test_where_loops_share_their_caches_tokens_and_runs_are_those_of_pytorch(
    kind: str, dialect: str, make_family: MakeFamily, make_package: MakePackage, tmp_path: Path
) -> None:
    """As of any MELT: its tokens may be others than those of plain decoding, so it must be asked for."""
    checkpoint, options = make_family("huginn" if kind == "melt" else kind), {}
    if kind == "melt":
        convert(checkpoint, tmp_path / "melt", chunk_size=8)
        checkpoint = tmp_path / "melt"
    else:
        options = {"share_caches": "last"}
    opened = Checkpoint.of(checkpoint)
    model = (opened.sharing() if options else opened).load().float()
    assert isinstance(model, MeltForCausalLM)
    runtime = Runtime.load(make_package(checkpoint, **FAMILY_SIZES, dialect=dialect, **options))
    most = runtime.manifest.loops
    for prompt in prompts(3):
        assert runtime.generate(prompt, **ASKED).pipeline is None
        for loops in (2, most):
            expected = greedy_tokens(
                model, prompt, 20, decode="staggered", num_loops=loops, chunk_size=8, lanes=min(loops, most)
            )
            found = runtime.generate(prompt, pipeline="on", loops=loops, **ASKED)
            assert list(found.token_ids) == expected.tokens
            assert found.pipeline is not None
            assert found.pipeline.runs == expected.runs


@pytest.mark.parametrize("exits", [{}, {"exit_kl": 0.2}, {"exit_same": 1}, {"exit_change": 0.5}], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_token_in_flight_is_plain_decoding_where_caches_are_shared(
    dialect: str, exits: dict[str, Any], make_runtime: Callable[..., Runtime]
) -> None:
    """With one token in flight at a time nothing is staggered, so caches and depths are those of plain decoding."""
    runtime = make_runtime("huginn", share_caches="last", dialect=dialect)
    settings, drivers = LoopSettings(5, start_seed=5, **exits), [runtime.driver(), runtime.driver()]
    token, _ = (int(driver.append([PROMPT], settings)[0].argmax()) for driver in drivers)
    for _ in range(6):
        piped = drivers[0].advance([[token]], settings, pipelining=Pipelining(lambda logits, ahead: None)).row(0)
        np.testing.assert_allclose(piped, drivers[1].append([[token]], settings)[0], rtol=1e-5, atol=1e-6)
        assert drivers[0].depth == drivers[1].depth
        length = int(drivers[0].lengths[0])
        kept = [driver.state.read_positions(0, 0, length) for driver in drivers]
        for name, values in kept[0].items():
            np.testing.assert_allclose(values, kept[1][name], rtol=1e-5, atol=1e-6, err_msg=name)
        token = int(piped.argmax())
    assert (min(drivers[0].depth[0]) < 5) == bool(exits)


def test_what_cannot_be_pipelined_says_why(make_family: MakeFamily, make_package: MakePackage) -> None:
    for options, why in (
        ({"chunk": 1}, "chunk is 1"),
        ({"dialect": "standard", "max_batch": 1, "chunk": 8}, "--max-batch 1"),
    ):
        runtime = Runtime.load(make_package(make_family("huginn"), max_seq_len=64, **options))
        with pytest.raises(ArgumentError, match=why):
            runtime.generate(PROMPT, pipeline="on")
        assert runtime.generate(PROMPT, max_tokens=2).pipeline is None
    with pytest.raises(ArgumentError, match="exit_kl"):
        runtime.generate(PROMPT, pipeline="on", exit_kl=0.1)
