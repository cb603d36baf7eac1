"""The Python API: prompts in, text out, and every impossible request refused before anything is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakePackage
from melt_models.checkpoint import load_model
from melt_runtime import ArgumentError, BackendError, Generator, LoopSettings, PromptError, Runtime


@pytest.fixture(scope="module")
def runtime(tiny_package: Path) -> Runtime:
    return Runtime.load(tiny_package)


def test_greedy_generation_equals_transformers_generate(runtime: Runtime, tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    prompt = [7, 12, 30, 5, 9, 22, 41, 3, 17, 28, 6]
    for loops in (1, 3, 4, 6):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, num_loops=loops, eos_token_id=None
        )[0, len(prompt) :].tolist()
        got = runtime.generate(prompt, max_tokens=20, loops=loops, ignore_eos=True)
        assert list(got.token_ids) == expected
        assert set(got.depth) == {loops}


def test_prompts_of_different_lengths_give_what_they_give_alone(runtime: Runtime) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 45, n).tolist() for n in (1, 23, 8, 9, 16, 2, 5, 11, 30, 4)]  # more than max_batch
    together = runtime.generate(prompts, max_tokens=12, ignore_eos=True)
    assert [g.token_ids for g in together] == [
        runtime.generate(p, max_tokens=12, ignore_eos=True).token_ids for p in prompts
    ]
    assert [g.prompt_tokens for g in together] == [len(p) for p in prompts]


def test_a_sequence_that_ends_does_not_disturb_the_others(runtime: Runtime) -> None:
    prompts = [[5, 6, 7], [20, 21, 22, 23], [9]]
    alone = [runtime.generate(p, max_tokens=16, ignore_eos=True) for p in prompts]
    stop = alone[1].token_ids[2]
    stopped = runtime.generate(prompts, max_tokens=16, ignore_eos=True, stop_ids=[stop])
    for one, both in zip(alone, stopped, strict=True):
        ends = one.token_ids.index(stop) + 1 if stop in one.token_ids else 16
        assert both.token_ids == one.token_ids[:ends]
        assert both.finish_reason == ("stop" if ends < 16 else both.finish_reason)


def test_streaming_gives_the_same_text_in_pieces(runtime: Runtime) -> None:
    text = runtime.generate("hello there", max_tokens=30, ignore_eos=True).text
    deltas = list(runtime.stream("hello there", max_tokens=30, ignore_eos=True))
    assert len(deltas) > 1
    assert "".join(deltas) == text


def test_the_same_seed_draws_the_same_text(runtime: Runtime) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5, "top_k": 20, "ignore_eos": True}
    first = runtime.generate("hello", seed=3, **options)
    assert runtime.generate("hello", seed=3, **options) == first
    assert runtime.generate("hello", seed=4, **options) != first


def test_sequences_of_a_batch_draw_independently(runtime: Runtime) -> None:
    a, b = runtime.generate([[5, 6], [5, 6]], max_tokens=20, temperature=2.0, seed=1, ignore_eos=True)
    assert a.token_ids != b.token_ids


def test_sequences_of_several_batches_draw_independently(runtime: Runtime) -> None:
    count = 2 * runtime.manifest.max_batch
    answers = runtime.generate([[5, 6]] * count, max_tokens=20, temperature=2.0, seed=1, ignore_eos=True)
    assert len({answer.token_ids for answer in answers}) == count


def test_a_stop_string_that_straddles_tokens_ends_the_text_before_it(runtime: Runtime) -> None:
    text = runtime.generate("abc", max_tokens=40, ignore_eos=True).text
    stop = text[5:8]
    stopped = runtime.generate("abc", max_tokens=40, ignore_eos=True, stop=stop)
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]
    assert "".join(runtime.stream("abc", max_tokens=40, ignore_eos=True, stop=[stop])) == stopped.text


def test_a_stop_id_ends_the_sequence_and_is_not_shown(runtime: Runtime) -> None:
    free = runtime.generate("abc", max_tokens=20, ignore_eos=True)
    stop = free.token_ids[4]
    at = free.token_ids.index(stop)
    stopped = runtime.generate("abc", max_tokens=20, ignore_eos=True, stop_ids=stop)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: at + 1]
    assert len(stopped.text) == at


@pytest.mark.parametrize("stop", ["<pad>", ["no such text", "<pad>"]])
def test_a_stop_string_that_names_a_special_token_stops_there(runtime: Runtime, stop: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 200, "temperature": 5.0, "seed": 2, "ignore_eos": True}
    free = runtime.generate("abc", **options)
    assert free.finish_reason == "length"
    ends = free.token_ids.index(0)
    stopped = runtime.generate("abc", **options, stop=stop)
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[: ends + 1], "stop")
    assert stopped.text == free.text[: len(stopped.text)]
    assert "".join(runtime.stream("abc", **options, stop=stop)) == stopped.text
    session = runtime.session(**options)
    session.append("abc")
    assert session.generate(stop=stop).token_ids == stopped.token_ids


def test_a_special_token_within_a_stop_string_counts(runtime: Runtime) -> None:
    assert runtime.tokenizer is not None
    options: dict[str, Any] = {"max_tokens": 200, "temperature": 5.0, "seed": 2, "ignore_eos": True}
    free = runtime.generate("abc", **options)
    at = free.token_ids.index(0)
    around = [runtime.tokenizer.decode([free.token_ids[at + step]], skip_special_tokens=False) for step in (-1, 1)]
    stopped = runtime.generate("abc", **options, stop="<pad>".join(around))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: at + 2]
    assert stopped.text == runtime.tokenizer.decode(free.token_ids[: at - 1])


@pytest.mark.parametrize("kind", [list, tuple, set, np.array, range, np.int64], ids=lambda kind: kind.__name__)
def test_stop_ids_may_be_any_collection_of_whole_numbers_and_of_numpys(runtime: Runtime, kind: Any) -> None:
    given = {range: lambda ids: range(ids[0], ids[1] + 1), np.int64: lambda ids: np.int64(ids[0])}.get(kind, kind)(
        [7, 8]
    )
    found = runtime.options(stop_ids=given, ignore_eos=True).stop_ids
    assert found == ({7} if kind is np.int64 else {7, 8})
    assert {type(one) for one in found} == {int}
    assert runtime.options(stop_ids=np.array([], np.int64)).stop_ids == runtime.stop_ids


def test_the_checkpoints_end_token_stops_by_default(runtime: Runtime) -> None:
    assert runtime.stop_ids == {1}


def test_generation_stops_at_the_end_of_the_cache(make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> None:
    runtime = Runtime.load(make_package(make_checkpoint(), max_seq_len=16, max_batch=1))
    driver = runtime.driver()
    generator = Generator(driver, [[5] * 10], runtime.options(max_tokens=100, ignore_eos=True), None)
    deltas = list(generator)
    assert deltas[-1].finish_reason == "length"
    assert len(deltas) == 16 - 10 + 1  # the last token is drawn from a full cache and never enters it
    assert int(driver.lengths[0]) == 16
    with pytest.raises(PromptError, match="room for 0 of 16"):
        driver.append([[3]], LoopSettings(1))


def test_a_prompt_may_fill_the_cache(make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> None:
    runtime = Runtime.load(make_package(make_checkpoint(), max_seq_len=16, max_batch=1))
    result = runtime.generate([5] * 16, max_tokens=5, ignore_eos=True)
    assert (len(result.token_ids), result.finish_reason) == (1, "length")


def test_early_exit_spends_fewer_loops(runtime: Runtime) -> None:
    full = runtime.generate([5, 6, 7, 8], max_tokens=12, ignore_eos=True)
    early = runtime.generate([5, 6, 7, 8], max_tokens=12, ignore_eos=True, exit_threshold=0.7)
    assert sum(early.depth) < sum(full.depth)
    assert set(early.depth) <= {1, 2, 3, 4}
    never = runtime.generate([5, 6, 7, 8], max_tokens=12, ignore_eos=True, exit_threshold=1.0)
    assert never.token_ids == full.token_ids


def test_a_smaller_chunk_is_the_models_other_meaning(runtime: Runtime, tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    prompt = list(range(3, 23))
    driver = runtime.driver()
    for chunk in (1, 3, 8):
        driver.reset()
        got = driver.append([prompt], LoopSettings(4, chunk=chunk))[0]
        with torch.no_grad():
            expected = model(torch.tensor([prompt]), chunk_size=chunk, logits_to_keep=1).logits[0, -1].numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_chat_messages_go_through_the_template(runtime: Runtime) -> None:
    ids = runtime.chat_prompt([{"role": "user", "content": "hello"}])
    assert runtime.tokenizer is not None
    assert runtime.tokenizer.decode(ids) == "user: hello!assistant: "


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("", "empty"),
        ([], "no prompt|empty"),
        ([[5], []], "empty"),
        ([5] * 257, "do not fit"),
        ([50], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ([10**20], "whole numbers inside"),
        ([[1.5]], "whole numbers"),
    ],
    ids=["empty text", "empty list", "one empty", "too long", "id too large", "negative id", "huge id", "not whole"],
)
def test_a_prompt_that_cannot_be_used_is_refused(runtime: Runtime, prompt: Any, word: str) -> None:
    with pytest.raises(PromptError, match=word):
        runtime.generate(prompt)


@pytest.mark.parametrize("wrong", [[50], [-1], [1.5], [None], ["a"], [10**20]], ids=str)
def test_a_token_that_cannot_be_used_is_refused_in_the_middle_of_decoding(runtime: Runtime, wrong: Any) -> None:
    driver, settings = runtime.driver(2), LoopSettings(3)
    expected = runtime.driver(2)
    for tokens in ([[5, 6, 7], [8, 9]], [[10], [11]], [[12], [13]]):
        driver.append(tokens, settings)
        expected.append(tokens, settings)
    for tokens in ([[14], wrong], [wrong, [14]], [[14]], [[14]] * 3):
        with pytest.raises(PromptError):
            driver.append(tokens, settings)
    with pytest.raises(ArgumentError):
        driver.append([[14], [15]], [settings])
    assert driver.lengths.tolist() == [5, 4]
    np.testing.assert_array_equal(driver.append([[14], [15]], settings), expected.append([[14], [15]], settings))
    assert driver.depth == expected.depth == [[3] * 6, [3] * 5]


@pytest.mark.parametrize(
    "options",
    [
        {"loops": 0},
        {"loops": -3},
        {"loops": 2.5},
        {"loops": True},
        {"exit_threshold": -0.1},
        {"exit_threshold": 1.1},
        {"exit_threshold": "x"},
        {"exit_threshold": float("nan")},
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"chunk": 0},
        {"chunk": 9},
        {"temperature": -1},
        {"top_p": 0},
        {"stop": ""},
        {"stop_ids": ["a"]},
        {"stop_ids": "12"},
        {"stop_ids": 1.5},
        {"stop_ids": np.array([1.5, 2.0])},
        {"stop_ids": np.array([[1, 2], [3, 4]])},
        {"temprature": 1},
    ],
    ids=str,
)
def test_an_option_that_makes_no_sense_is_refused(runtime: Runtime, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        runtime.generate([5, 6], **options)


def test_more_sequences_than_exported_for_are_refused(runtime: Runtime) -> None:
    with pytest.raises(ArgumentError, match="1 to 8 sequences"):
        runtime.driver(9)


def test_without_a_tokenizer_text_is_refused_and_ids_work(tiny_package_without_tokenizer: Path) -> None:
    runtime = Runtime.load(tiny_package_without_tokenizer)
    with pytest.raises(PromptError, match="no tokenizer"):
        runtime.generate("hello")
    with pytest.raises(ArgumentError, match="no tokenizer"):
        runtime.stream([5, 6])
    with pytest.raises(ArgumentError, match="stop strings need a tokenizer"):
        runtime.generate([5, 6], stop="x")
    assert len(runtime.generate([5, 6], max_tokens=3, ignore_eos=True).token_ids) == 3


@pytest.mark.parametrize("threads", [0, -1, 10**9])
def test_a_thread_count_that_makes_no_sense_is_refused(tiny_package: Path, threads: int) -> None:
    with pytest.raises(ArgumentError, match="threads"):
        Runtime.load(tiny_package, threads=threads)


def test_an_unknown_backend_is_refused(tiny_package: Path) -> None:
    with pytest.raises(ArgumentError, match="backend 'abacus'"):
        Runtime.load(tiny_package, backend="abacus")


def test_a_bf16_package_says_what_to_do(make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> None:
    package = make_package(make_checkpoint(), precision="bf16", dialect="standard")
    with pytest.raises(BackendError, match="fp32 or fp16"):
        Runtime.load(package)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_low_memory_gives_the_same_answers(tiny_checkpoint: Path, make_package: MakePackage, precision: str) -> None:
    package = make_package(tiny_checkpoint, precision=precision)
    usual, lean = Runtime.load(package).driver(), Runtime.load(package, low_memory=True).driver()
    tokens = [[7, 12, 30, 5, 9, 22, 41, 3, 17]]
    expected, got = (driver.append(tokens, LoopSettings(4)) for driver in (usual, lean))
    np.testing.assert_allclose(got, expected, rtol=0, atol=(1e-4 if precision == "fp32" else 2e-2))
