"""Pipelined decoding of a LoopLM gives the tokens of plain decoding, and leaves nothing but final tokens behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import ArgumentError, LoopSettings, Runtime
from melt_runtime.decoding.loop_driver import Interrupted, LoopDriver
from melt_runtime.decoding.pipeline import Advancing, PipelineCounts, Pipelining
from melt_runtime.package.specs import DIALECTS

from melt_export.quantization.options import BITS, CacheOptions, WeightOptions

LOOPS = 4
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]


@pytest.fixture(scope="module")
def runtime(make_package: MakePackage, make_looplm: MakeCheckpoint) -> Runtime:
    return Runtime.load(make_package(make_looplm(), chunk=8))


def plain(runtime: Runtime, count: int, loops: int = LOOPS) -> list[int]:
    return list(runtime.generate(PROMPT, loops=loops, max_tokens=count, ignore_eos=True, pipeline="off").token_ids)


def prompts(runtime: Runtime, count: int) -> list[list[int]]:
    random = np.random.default_rng(count)
    size = runtime.manifest.vocab_size
    return [random.integers(0, size, random.integers(1, 12)).tolist() for _ in range(count)]


@pytest.mark.parametrize("loops", [2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8},
        {"temperature": 1.5, "top_k": 5, "repetition_penalty": 1.1},
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 1.5},
        {"temperature": 0.7, "presence_penalty": 1.0, "logit_bias": {7: 4.0, 9: -100.0}},
    ],
)
def test_tokens_are_those_of_plain_decoding(runtime: Runtime, loops: int, options: dict[str, Any]) -> None:
    for seed, prompt in enumerate(prompts(runtime, 5)):
        asked = {**options, "loops": loops, "max_tokens": 24, "ignore_eos": True, "seed": seed}
        alone = runtime.generate(prompt, pipeline="off", **asked)
        piped = runtime.generate(prompt, pipeline="on", **asked)
        assert piped == alone
        assert alone.pipeline is None
        assert piped.pipeline is not None
        assert piped.pipeline.tokens == 23  # the prompt gives the first
        assert 23 + loops - 1 <= piped.pipeline.runs <= 23 * loops


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "fp16"},
        {"weights": WeightOptions("int4", method="rtn")},
        *({"cache": CacheOptions(kind)} for kind in BITS),
    ],
    ids=["fp32", "fp16", "weights-int4", *BITS],
)
def test_every_precision_and_cache_gives_plain_tokens(
    make_package: MakePackage, make_looplm: MakeCheckpoint, dialect: str, options: dict[str, Any]
) -> None:
    if dialect != "onnxruntime" and not options.keys() <= {"precision"}:
        pytest.skip("quantized packages of the standard dialect are for engines; of the portable one there are none")
    runtime = Runtime.load(make_package(make_looplm(), chunk=8, dialect=dialect, **options))
    for prompt in prompts(runtime, 4):
        asked: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
        assert runtime.generate(prompt, pipeline="on", **asked) == runtime.generate(prompt, pipeline="off", **asked)


def greedy(logits: np.ndarray, ahead: Sequence[int]) -> int:
    return int(logits.argmax())


def counting(driver: LoopDriver) -> PipelineCounts:
    """Begin the counts of a driver's only sequence."""
    assert driver.pipeline is not None
    counts = PipelineCounts(LOOPS)
    driver.pipeline.begin(0, counts)
    return counts


def decode(
    driver: LoopDriver, first: int, count: int, drafts: Any, loops: int = LOOPS
) -> tuple[list[int], list[np.ndarray]]:
    """Decode greedily with the given drafts. Returns the tokens, and the logits that each was taken from."""
    tokens, rows = [first], []
    for _ in range(count):
        row = driver.advance(
            [[tokens[-1]]],
            LoopSettings(loops),
            pipelining=Pipelining(lambda logits, ahead: drafts(tokens, logits, ahead)),
        ).row(0)
        rows.append(row.copy())
        tokens.append(int(row.argmax()))
    return tokens[1:], rows


def test_perfect_drafts_take_one_run_per_token(runtime: Runtime) -> None:
    known = plain(runtime, 20)
    driver = runtime.driver()
    first = int(driver.append([PROMPT], LoopSettings(LOOPS))[0].argmax())

    def drafts(tokens: Sequence[int], logits: np.ndarray, ahead: Sequence[int]) -> int | None:
        place = len(tokens) + len(ahead)
        return known[place] if place < len(known) else None

    counts = counting(driver)
    tokens, _ = decode(driver, first, 19, drafts)
    assert [first, *tokens] == known
    use = counts.use()
    assert use is not None
    assert use.runs == 19 + LOOPS - 1
    assert use.held == (18, 0, 0, 0)
    assert not any(use.dropped)


@pytest.mark.parametrize("wrong", range(1, 6))
@pytest.mark.parametrize("by", range(1, LOOPS))
def test_a_wrong_draft_at_any_place_from_any_loop_changes_nothing(runtime: Runtime, wrong: int, by: int) -> None:
    """The draft of one place is wrong until it is predicted by a loop later than ``by``."""
    known, runs = plain(runtime, 16), [0]
    driver = runtime.driver()
    first = int(driver.append([PROMPT], LoopSettings(LOOPS))[0].argmax())
    asked: dict[int, int] = {}

    def drafts(tokens: Sequence[int], logits: np.ndarray, ahead: Sequence[int]) -> int | None:
        place = len(tokens) + len(ahead)
        asked[place] = asked.get(place, 0) + 1
        if place >= len(known):
            return None
        right = known[place]
        if place % 6 == wrong and asked[place] <= by:
            runs[0] += 1
            return (right + 1) % runtime.manifest.vocab_size
        return right

    counts = counting(driver)
    tokens, rows = decode(driver, first, 15, drafts)
    assert [first, *tokens] == known
    assert runs[0]
    assert any(counts.dropped)
    alone = runtime.driver()
    alone.append([PROMPT], LoopSettings(LOOPS))
    for token, row in zip([first, *tokens], rows, strict=False):
        np.testing.assert_array_equal(alone.append([[token]], LoopSettings(LOOPS))[0], row)


def test_caches_hold_the_final_tokens_only(runtime: Runtime) -> None:
    """Everything that a later call may read is as plain decoding leaves it, with drafts in flight or without."""
    drivers = [runtime.driver(), runtime.driver()]
    settings = LoopSettings(LOOPS)
    token, _ = (int(driver.append([PROMPT], settings)[0].argmax()) for driver in drivers)
    for _ in range(9):
        piped = drivers[0].advance([[token]], settings, pipelining=Pipelining(greedy)).row(0)
        np.testing.assert_array_equal(piped, drivers[1].append([[token]], settings)[0])
        assert drivers[0].depth == drivers[1].depth
        assert drivers[0].lengths.tolist() == drivers[1].lengths.tolist()
        length = int(drivers[0].lengths[0])
        kept = [driver.state.read_positions(0, 0, length) for driver in drivers]
        assert kept[0].keys() == kept[1].keys()
        for name, values in kept[0].items():
            np.testing.assert_array_equal(values, kept[1][name])
        token = int(piped.argmax())


@pytest.mark.parametrize("change", ["truncate", "append", "restore", "clear", "error", "interrupt"])
def test_tokens_in_flight_are_forgotten_when_the_sequence_changes(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The same token as the one in flight must run anew after the tokens before it have changed."""
    settings, driver = LoopSettings(LOOPS), runtime.driver()
    token = int(driver.append([PROMPT], settings)[0].argmax())

    for _ in range(5):
        token = int(driver.advance([[token]], settings, pipelining=Pipelining(greedy)).row(0).argmax())
    assert driver.pipeline is not None
    inside = driver.pipeline._sequences[0].flights
    assert inside
    token, length = inside[0].token, int(driver.lengths[0])
    other = [(id + 1) % runtime.manifest.vocab_size for id in PROMPT]
    tokens = other + other
    if change == "truncate":
        driver.truncate(0, 0)
        driver.append([tokens[:length]], settings)
    elif change == "append":
        driver.append([[1, 2]], settings)
        tokens = []
    elif change == "clear":
        driver.clear(0)
        driver.append([tokens[:length]], settings)
    elif change == "restore":
        source = runtime.driver()
        source.append([tokens[:length]], settings)
        driver.truncate(0, 0)
        driver.restore(0, source.state.read_positions(0, 0, length), source.depth[0])
    else:
        failing: type[BaseException] = KeyboardInterrupt if change == "error" else Interrupted

        def fail(*arguments: object) -> None:
            raise failing

        with monkeypatch.context() as patch:
            if change == "error":
                patch.setattr(type(driver.state), "run_head", fail)
            with pytest.raises(failing):
                driver.advance(
                    [[token]], settings, fail if change == "interrupt" else None, pipelining=Pipelining(greedy)
                )
        tokens = []
    found = driver.advance([[token]], settings, pipelining=Pipelining(greedy)).row(0).copy()
    alone = runtime.driver()
    if tokens:
        alone.append([tokens[:length]], settings)
    else:
        alone.restore(0, driver.state.read_positions(0, 0, int(driver.lengths[0]) - 1), driver.depth[0][:-1])
    np.testing.assert_array_equal(found, alone.append([[token]], settings)[0])


def test_a_session_goes_on_after_pipelined_tokens_as_after_plain_ones(runtime: Runtime, tmp_path: Path) -> None:
    answers = []
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


def test_it_ends_at_the_last_position(make_package: MakePackage, make_looplm: MakeCheckpoint) -> None:
    for dialect in DIALECTS:
        runtime = Runtime.load(make_package(make_looplm(), chunk=4, max_seq_len=16, dialect=dialect))
        asked: dict[str, Any] = {"max_tokens": 50, "ignore_eos": True}
        piped = runtime.generate(PROMPT, pipeline="on", **asked)
        assert piped.finish_reason == "length"
        assert piped == runtime.generate(PROMPT, pipeline="off", **asked)


def test_stop_strings_and_end_tokens_end_it_at_the_same_token(
    make_package: MakePackage, make_looplm: MakeCheckpoint, runtime: Runtime
) -> None:
    known = plain(runtime, 12)
    for stop in (known[0], known[5], known[11]):
        asked: dict[str, Any] = {"max_tokens": 12, "stop_ids": [stop]}
        piped = runtime.generate(PROMPT, pipeline="on", **asked)
        assert piped == runtime.generate(PROMPT, pipeline="off", **asked)


def test_several_sequences_share_a_run(runtime: Runtime) -> None:
    """Each sequence is in flight by itself, at its own depth and pace."""
    settings = [LoopSettings(loops) for loops in (4, 3, 2)]
    starts = [PROMPT, PROMPT[:3], [8]]
    driver, alone = runtime.driver(3), [runtime.driver() for _ in starts]
    logits = driver.append(starts, settings)
    for one, start, how in zip(alone, starts, settings, strict=True):
        one.append([start], how)
    pipeline = driver.pipeline
    assert pipeline is not None
    fed = {}
    for slot in range(3):
        fed[slot] = int(logits[slot].argmax())
        pipeline.feed(slot, fed[slot])
    counts = [0, 0, 0]
    for _ in range(60):
        advancing = {slot: Advancing(how, greedy) for slot, how in enumerate(settings)}
        for slot in pipeline.run(advancing):
            row = pipeline.row(slot)
            np.testing.assert_array_equal(row, alone[slot].append([[fed[slot]]], settings[slot])[0])
            fed[slot] = int(row.argmax())
            pipeline.feed(slot, fed[slot])
            counts[slot] += 1
    assert counts[0] >= 15
    assert counts[2] >= 30


def test_what_cannot_be_pipelined_says_why(
    make_package: MakePackage, make_looplm: MakeCheckpoint, runtime: Runtime, tiny_package: Path
) -> None:
    single = make_package(make_looplm(), chunk=8, dialect="standard", max_batch=1)
    with pytest.raises(ArgumentError, match="--max-batch 1"):
        Runtime.load(single).generate(PROMPT, pipeline="on")
    with pytest.raises(ArgumentError, match="several prompts"):
        runtime.generate([PROMPT, PROMPT], pipeline="on")
    wrong: list[Any] = ["yes", True, None, ["on"], np.array(["on"]), np.array(["on", "off"])]
    for value in wrong:
        with pytest.raises(ArgumentError, match="auto, on, off"):
            runtime.generate(PROMPT, pipeline=value)
    assert runtime.generate([PROMPT, PROMPT], max_tokens=2)[0].pipeline is None
    assert Runtime.load(single).generate(PROMPT, max_tokens=2).pipeline is None


def test_packed_sequences_keep_what_they_hold(runtime: Runtime) -> None:
    """Sequences move together when others leave, and apart again when others come."""
    driver = runtime.driver(3)
    driver.append([PROMPT, PROMPT[:5], []], LoopSettings(LOOPS))
    lengths = driver.lengths.tolist()
    before = [driver.state.read_positions(slot, 0, lengths[slot]) for slot in (0, 1)]
    for count in (2, 1):
        packed = driver.state.packed(count)
        driver.state.repack(packed, lengths[:count])
        for slot in range(count):
            for name, values in packed.read_positions(slot, 0, lengths[slot]).items():
                np.testing.assert_array_equal(values, before[slot][name])
        packed.repack(driver.state, lengths[:count])
        for slot in range(count):
            for name, values in driver.state.read_positions(slot, 0, lengths[slot]).items():
                np.testing.assert_array_equal(values, before[slot][name])


def test_depth_is_checked_again_after_the_tokens_before_have_changed(runtime: Runtime) -> None:
    driver, deep = runtime.driver(), LoopSettings(LOOPS)
    driver.append([PROMPT], deep)
    driver.advance([[4]], deep, pipelining=Pipelining(greedy))
    driver.clear(0)
    driver.append([PROMPT], LoopSettings(2))
    positions, depth = driver.state.read_positions(0, 0, len(PROMPT)), list(driver.depth[0])
    with pytest.raises(ArgumentError, match="tokens in the cache ran 2"):
        driver.advance([[4]], deep, pipelining=Pipelining(greedy))
    driver.clear(0)
    driver.append([PROMPT], deep)
    driver.advance([[4]], deep, pipelining=Pipelining(greedy))
    driver.clear(0)
    driver.restore(0, positions, depth)
    with pytest.raises(ArgumentError, match="tokens in the cache ran 2"):
        driver.advance([[4]], deep, pipelining=Pipelining(greedy))
