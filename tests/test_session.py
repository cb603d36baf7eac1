"""A conversation goes on from call to call as in one run; it branches, goes back and is saved, to the same tokens."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_parts
from conftest import MakePackage
from melt_runtime import (
    ArgumentError,
    BackendError,
    LoopDriver,
    LoopSettings,
    PromptError,
    Runtime,
    Session,
    SessionError,
    session_file,
)

every_backend = test_parts.runtime
README = Path(__file__).parent.parent / "README.md"
PROMPT = list(range(3, 22))  # two chunks of 8 and one of 3
MORE = [30, 31, 32, 33]
SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_k": 20, "seed": 7}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "penalised": {**SAMPLED, "repetition_penalty": 1.4, "top_k": 0, "top_p": 0.9},
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
        lambda self, tokens, settings: ran.append(len(tokens[0])) or advance(self, tokens, settings),
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
    pieces = [next(stream) for _ in range(4)]
    assert "".join(pieces) == expected.text[:4]
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
    assert runtime.codec is not None
    encode = runtime.codec.encode
    monkeypatch.setattr(
        runtime.codec, "encode", lambda text, add_special_tokens=True: [2] * add_special_tokens + encode(text)
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
    assert (session.room, session.generate().finish_reason, session.room) == (0, "length", -1)
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
    kept, ran = session.driver.state.rows(0, 0, 13), list[int]()
    session.truncate(13)
    advance = LoopDriver.advance
    monkeypatch.setattr(
        LoopDriver,
        "advance",
        lambda self, tokens, settings: ran.append(len(tokens[0])) or advance(self, tokens, settings),
    )
    session.append(MORE)
    assert ran == [4]
    assert session.chunks == (0, 8, 13)
    assert all(np.array_equal(values, kept[name]) for name, values in session.driver.state.rows(0, 0, 13).items())


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


# In a file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.session"


def after_prompt(session: Session) -> None:
    """Nothing was drawn yet."""


def after_drawing(session: Session) -> None:
    session.generate(max_tokens=3)


def after_a_turn(session: Session) -> None:
    session.generate(max_tokens=3)
    session.append(MORE, chunk=3)


def after_going_back(session: Session) -> None:
    session.generate(max_tokens=5)
    session.rewind(8)


MOMENTS = (after_prompt, after_drawing, after_a_turn, after_going_back)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_loaded_session_goes_on_as_the_saved_one(
    every_backend: Runtime, path: Path, way: str, moment: Callable[[Session], None]
) -> None:
    session = opened(every_backend, loops=3, **WAYS[way])
    moment(session)
    session.save(path)
    loaded = every_backend.load_session(path)
    assert (loaded.tokens, loaded.depth, loaded.chunks) == (session.tokens, session.depth, session.chunks)
    for _ in range(2):
        assert loaded.generate(max_tokens=7) == session.generate(max_tokens=7)
        loaded.append(MORE)
        session.append(MORE)
    assert np.array_equal(loaded.logits(), session.logits())


def test_a_session_with_tokens_of_different_depth_is_saved_as_it_is(runtime: Runtime, path: Path) -> None:
    session = opened(runtime, exit_threshold=0.8)
    session.generate(max_tokens=6)
    assert len(set(session.depth)) > 1
    session.save(path)
    loaded = Session.load(runtime, path)
    assert loaded.generate(max_tokens=9) == session.generate(max_tokens=9)


CONTINUE = """
import json, sys
from melt_runtime import Runtime
session = Runtime.load(sys.argv[1]).load_session(sys.argv[2])
print(json.dumps([session.generate(max_tokens=9).token_ids, session.tokens]))
"""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("moment", [after_prompt, after_drawing])
def test_another_process_goes_on_as_this_one(
    runtime: Runtime, tiny_package: Path, path: Path, way: str, moment: Callable[[Session], None]
) -> None:
    session = opened(runtime, **WAYS[way])
    moment(session)
    session.save(path)
    command = [sys.executable, "-c", CONTINUE, str(tiny_package), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    drawn = session.generate(max_tokens=9).token_ids
    assert json.loads(result.stdout) == [list(drawn), list(session.tokens)]


def test_a_file_holds_the_used_rows_and_little_else(runtime: Runtime, path: Path) -> None:
    session = opened(runtime)
    session.save(path)
    rows = runtime.manifest.cache_bytes(len(PROMPT))
    assert rows < path.stat().st_size < rows + 6000 < runtime.state_bytes()


def test_an_empty_session_can_be_saved(runtime: Runtime, path: Path) -> None:
    runtime.session(loops=2, stop=("ab", "c"), stop_ids={4, 5}).save(path)
    session = runtime.load_session(path)
    assert session.tokens == ()
    session.append(PROMPT)
    assert set(session.depth) == {2}
    assert (session.options["stop"], session.options["stop_ids"]) == (["ab", "c"], [4, 5])


def test_options_that_no_file_can_hold_are_refused(runtime: Runtime, path: Path) -> None:
    session = opened(runtime)
    session.options["stop_ids"] = object()
    with pytest.raises(ArgumentError, match="cannot be written"):
        session.save(path)
    assert not path.exists()


def test_a_session_of_another_package_is_refused(
    runtime: Runtime, make_package: MakePackage, tiny_checkpoint: Path, path: Path
) -> None:
    opened(runtime).save(path)
    other = Runtime.load(make_package(tiny_checkpoint, max_seq_len=128))
    with pytest.raises(SessionError, match="saved with another package"):
        other.load_session(path)


def test_engines_change_nothing_of_what_a_session_belongs_to(runtime: Runtime, package_copy: Path, path: Path) -> None:
    opened(runtime).save(path)
    manifest = package_copy / "manifest.json"
    other = Runtime.load(package_copy)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "engines": {}}, indent=2) + "\n")
    assert other.load_session(path).tokens == tuple(PROMPT)


def test_a_changed_byte_anywhere_is_refused(runtime: Runtime, path: Path) -> None:
    session = opened(runtime)
    session.generate(max_tokens=2)
    session.save(path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = {*range(0, header, 7), *range(header, len(content), 509), len(content) - 1}
    for place in sorted(places):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(SessionError):
            runtime.load_session(path)


def test_a_truncated_file_is_refused(runtime: Runtime, path: Path) -> None:
    opened(runtime).save(path)
    content = path.read_bytes()
    for length in (0, 4, 8, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(SessionError, match="damaged"):
            runtime.load_session(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(SessionError, match="damaged"):
        runtime.load_session(path)


def test_what_is_no_saved_session_is_refused(runtime: Runtime, tmp_path: Path, tiny_checkpoint: Path) -> None:
    for file, why in (
        (tmp_path / "missing", "there is no saved session"),
        (tmp_path, "there is no saved session"),
        (tiny_checkpoint / "model.safetensors", "its format is not"),
    ):
        with pytest.raises(SessionError, match=why):
            runtime.load_session(file)


IMPOSSIBLE: dict[str, Callable[[session_file.Saved], dict[str, Any]]] = {
    "a token outside the vocabulary": lambda s: {"tokens": s.tokens + 50},
    "more depths than tokens": lambda s: {"depth": np.append(s.depth, 4)},
    "a token that ran no loop": lambda s: {"depth": s.depth * 0},
    "a drawn token outside the vocabulary": lambda s: {"drawn": 50},
    "a drawn token that is none": lambda s: {"drawn": "a"},
    "chunks that begin later": lambda s: {"chunk_starts": s.chunk_starts + 1},
    "chunks out of order": lambda s: {"chunk_starts": s.chunk_starts[::-1].copy()},
    "chunks that are too long": lambda s: {"chunk_starts": s.chunk_starts[:1], "chunk_settings": s.chunk_settings[:1]},
    "chunks without settings": lambda s: {"settings": []},
    "rows of fewer tokens": lambda s: {"rows": {name: values[:, :-1].copy() for name, values in s.rows.items()}},
    "rows of another type": lambda s: {"rows": {name: values.astype("f2") for name, values in s.rows.items()}},
    "a cache without rows": lambda s: {"rows": dict(list(s.rows.items())[1:])},
    "rows of something else": lambda s: {"rows": {**s.rows, "hidden": s.tokens}},
    "an unknown option": lambda s: {"options": {"looops": 1}},
    "an option out of range": lambda s: {"options": {"temperature": -1}},
    "a random state that is none": lambda s: {"random": {"state": 1}},
    "floats for tokens": lambda s: {"tokens": s.tokens.astype(float)},
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_a_file_whose_hash_is_right_and_whose_session_cannot_be_is_refused(
    runtime: Runtime, path: Path, what: str
) -> None:
    opened(runtime).save(path)
    saved = session_file.read(path, runtime.package, runtime.options)
    session_file.write(path, replace(saved, **IMPOSSIBLE[what](saved)))
    with pytest.raises(SessionError, match="cannot be"):
        runtime.load_session(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_beside(
    runtime: Runtime, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(runtime)
    session.save(path)
    before = path.read_bytes()
    session.generate(max_tokens=2)

    def full(arrays: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(session_file, "save_file", full)
        with pytest.raises(SessionError, match="no space left"):
            session.save(path)
    with pytest.raises(SessionError, match="cannot be written"):
        session.save(path.parent / "missing" / "chat.session")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    session.save(path)
    assert runtime.load_session(path).tokens == session.tokens
    assert os.listdir(path.parent) == [path.name]


def test_the_readmes_example_runs(tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.read_text(encoding="utf-8").split("## Sessions\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace('"PACKAGE"', repr(str(tiny_package))), names)
    again, session = names["again"], names["session"]
    assert again.tokens[: len(session.tokens)] == session.tokens
    assert len(names["store"]) > 0
