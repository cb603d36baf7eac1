"""A conversation goes on from call to call as in one run; it branches, goes back and is saved, to the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_parts
from melt_runtime import ArgumentError, BackendError, LoopDriver, LoopSettings, PromptError, Runtime, Session

every_backend = test_parts.runtime
PAGE = Path(__file__).parent.parent / "docs" / "runtime.md"
PROMPT = list(range(3, 22))  # two chunks of 8 and one of 3
MORE = [30, 31, 32, 33]
SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_k": 20, "seed": 7}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "penalised": {**SAMPLED, "repetition_penalty": 1.4, "top_k": 0, "top_p": 0.9},
    "biased": {**SAMPLED, "logit_bias": {30: 2.0, 3: -100.0}},
}


@pytest.fixture(scope="module")
def runtime(tiny_package: Path) -> Runtime:
    return Runtime.load(tiny_package)


def opened(runtime: Runtime, **options: Any) -> Session:
    """A session that goes on to max_tokens and holds the prompt."""
    session = runtime.session(ignore_eos=True, **options)
    session.append(PROMPT)
    return session


# Going on


@pytest.mark.parametrize("way", WAYS)
def test_calls_draw_together_what_one_would(runtime: Runtime, way: str) -> None:
    expected = runtime.generate(PROMPT, max_tokens=12, ignore_eos=True, **WAYS[way])
    session = opened(runtime, **WAYS[way])
    parts = [session.generate(max_tokens=count) for count in (1, 4, 7)]
    assert tuple(token for part in parts for token in part.token_ids) == expected.token_ids
    assert session.tokens == (*PROMPT, *expected.token_ids)
    assert parts[-1].depth == session.depth == expected.depth
    assert [part.prompt_tokens for part in parts] == [19, 20, 24]


def test_a_turn_after_a_drawn_token_is_that_token_and_then_chunks_of_its_own(every_backend: Runtime) -> None:
    session = opened(every_backend)
    drawn = session.generate(max_tokens=3).token_ids
    session.append(MORE)
    driver = every_backend.driver()
    for tokens in (PROMPT, *([token] for token in drawn)):
        driver.append([tokens], LoopSettings(4))
    expected = driver.append([MORE], LoopSettings(4))[0]
    assert np.array_equal(session.logits(), expected)
    assert session.chunks == (0, 8, 16, 19, 20, 21, 22)


def test_only_what_is_new_runs(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    session, ran = opened(runtime), list[int]()
    advance = LoopDriver.advance
    monkeypatch.setattr(
        LoopDriver,
        "advance",
        lambda self, tokens, settings, **how: ran.append(len(tokens[0])) or advance(self, tokens, settings, **how),
    )
    session.generate(max_tokens=3)
    session.append(MORE)
    session.generate(max_tokens=1)
    assert ran == [1, 1, 1, 4]  # two drawn tokens, the third before the turn, the turn, whose logits give the next


def test_a_stream_says_what_generate_says_and_keeps_what_was_drawn_when_it_is_left(runtime: Runtime) -> None:
    expected = opened(runtime, **SAMPLED).generate(max_tokens=9)
    session = opened(runtime, **SAMPLED)
    assert "".join(session.fork().stream(max_tokens=9)) == expected.text
    stream = session.stream(max_tokens=9)
    deltas = [next(stream) for _ in range(4)]
    assert "".join(deltas) == expected.text[:4]
    drawn = len(session) - len(PROMPT)
    assert session.generate(max_tokens=9 - drawn).token_ids == expected.token_ids[drawn:]


def test_a_stream_that_the_session_left_behind_is_refused(runtime: Runtime) -> None:
    for move in (lambda s: s.append(MORE), lambda s: s.rewind(1), lambda s: s.generate(max_tokens=1)):
        session = opened(runtime)
        stream = session.stream(max_tokens=9)
        next(stream)
        move(session)
        before = session.tokens
        with pytest.raises(ArgumentError, match="moved on"):
            next(stream)
        assert session.tokens == before


def test_a_calls_own_sampling_leaves_the_sessions_random_stream_alone(runtime: Runtime) -> None:
    one, other = opened(runtime, **SAMPLED), opened(runtime, **SAMPLED)
    one.generate(max_tokens=6, seed=99)
    one.rewind(6)
    assert one.generate(max_tokens=9).token_ids == other.generate(max_tokens=9).token_ids


def test_only_the_first_text_gets_what_the_tokenizer_puts_around_one(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runtime.tokenizer is not None
    encode = runtime.tokenizer.encode
    monkeypatch.setattr(
        runtime.tokenizer, "encode", lambda text, add_special_tokens=True: [2] * add_special_tokens + encode(text)
    )
    session = runtime.session()
    session.append("ab")
    session.append("cd")
    assert session.tokens == (2, *encode("ab"), *encode("cd"))


def test_what_does_not_fit_is_refused_and_changes_nothing(runtime: Runtime) -> None:
    session = opened(runtime)
    session.generate(max_tokens=2)
    before = session.tokens
    for prompt in ([], [50], [-1], [4] * (session.room + 1), "a" * 300):
        with pytest.raises(PromptError):
            session.append(prompt)
        with pytest.raises(ArgumentError, match="loops"):
            session.append(MORE, loops=0)
    assert session.tokens == before
    session.append([4] * session.room)
    assert (session.room, session.generate().finish_reason, session.room) == (0, "length", 0)
    with pytest.raises(PromptError, match="do not fit"):
        session.generate()


def test_an_empty_session_has_nothing_to_continue(runtime: Runtime) -> None:
    session = runtime.session()
    for call in (session.generate, session.stream, session.logits):
        with pytest.raises(PromptError, match="append a prompt first"):
            call()


def test_an_unknown_option_is_refused_when_the_session_opens(runtime: Runtime) -> None:
    with pytest.raises(ArgumentError, match="unknown option 'looops'"):
        runtime.session(looops=3)


def test_after_a_failure_the_session_holds_the_chunks_that_ran(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = runtime.session(ignore_eos=True)
    run, left = session.driver.state.run_chunk, [2]

    def fails(*arguments: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise BackendError("it broke")
        run(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(session.driver.state, "run_chunk", fails)
        with pytest.raises(BackendError, match="it broke"):
            session.append(PROMPT)
    assert session.tokens == tuple(PROMPT[:16])
    session.append(PROMPT[16:])
    assert session.generate(max_tokens=5).token_ids == opened(runtime).generate(max_tokens=5).token_ids


# Branches, and going back


@pytest.mark.parametrize("way", WAYS)
def test_a_branch_goes_on_alike_and_shares_nothing(every_backend: Runtime, way: str) -> None:
    session = opened(every_backend, **WAYS[way])
    session.generate(max_tokens=3)
    first, second = session.fork(), session.fork()
    first.append(MORE)
    first.generate(max_tokens=6)
    first.truncate(0)
    first.append([44] * 12)
    expected = opened(every_backend, **WAYS[way]).generate(max_tokens=10).token_ids[3:]
    assert session.generate(max_tokens=7).token_ids == expected
    assert second.generate(max_tokens=7).token_ids == expected


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_after_going_back_the_same_tokens_come_again(every_backend: Runtime, count: int) -> None:
    session = opened(every_backend, loops=3)
    expected = session.generate(max_tokens=6).token_ids
    session.rewind(count)
    assert session.tokens == (*PROMPT, *expected[: 6 - count])
    assert len(session.depth) == int(session.driver.lengths[0]) == len(session) - (count == 0)
    longer = opened(every_backend, loops=3).generate(max_tokens=11).token_ids
    assert session.generate(max_tokens=5).token_ids == longer[6 - count : 11 - count]


@pytest.mark.parametrize("length", [3, 8, 13, 16, 18])
def test_going_back_into_a_prompt_is_having_been_given_its_beginning(every_backend: Runtime, length: int) -> None:
    session, shorter = opened(every_backend), every_backend.session()
    session.truncate(length)
    shorter.append(PROMPT[:length])
    assert session.tokens == shorter.tokens
    np.testing.assert_allclose(session.logits(), shorter.logits(), rtol=1e-4, atol=1e-5)
    assert session.chunks == shorter.chunks


def test_going_back_and_appending_runs_no_kept_token_again(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(runtime)
    kept, ran = session.driver.state.read_positions(0, 0, 13), list[int]()
    session.truncate(13)
    advance = LoopDriver.advance
    monkeypatch.setattr(
        LoopDriver,
        "advance",
        lambda self, tokens, settings, **how: ran.append(len(tokens[0])) or advance(self, tokens, settings, **how),
    )
    session.append(MORE)
    assert ran == [4]
    assert session.chunks == (0, 8, 13)
    assert all(
        np.array_equal(values, kept[name]) for name, values in session.driver.state.read_positions(0, 0, 13).items()
    )


def test_going_back_keeps_the_depth_that_tokens_ran_at(runtime: Runtime) -> None:
    session = opened(runtime, loops=4)
    expected = session.logits()
    session.generate(max_tokens=3, loops=1)
    assert session.depth == (4,) * 19 + (1,) * 2
    session.truncate(19)
    assert np.array_equal(session.logits(loops=1), expected)
    assert session.depth == (4,) * 19


def test_going_back_further_than_there_are_tokens_is_refused(runtime: Runtime) -> None:
    session = opened(runtime)
    for method, value in ((session.rewind, 20), (session.rewind, -1), (session.truncate, 20), (session.truncate, True)):
        with pytest.raises(ArgumentError, match="between 0 and the 19 tokens"):
            method(value)
    session.rewind(19)
    assert (session.tokens, session.depth, session.chunks) == ((), (), ())
