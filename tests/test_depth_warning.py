"""More loops than a model was trained for: it runs, and whoever asked is told once what that may mean."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from melt_runtime import MeltWarning, Request, Runtime, Scheduler
from test_chat import said
from test_run_cli import process, run

TOLD = "loops is 9, but the model was trained for 4 loops per token: its answers may make no sense"
SHORT: dict[str, Any] = {"max_tokens": 2, "ignore_eos": True}

Ask = Callable[..., Any]


def in_a_session(runtime: Runtime, **options: Any) -> Any:
    session = runtime.session(**SHORT)
    session.append([5, 6])
    return session.generate(**options)


ASKS: dict[str, Ask] = {
    "generate": lambda runtime, **options: runtime.generate([5, 6], **SHORT, **options),
    "stream": lambda runtime, **options: list(runtime.stream([5, 6], **SHORT, **options)),
    "session": lambda runtime, **options: runtime.session(**options),
    "a call of a session": in_a_session,
}


@pytest.fixture
def runtime(tiny_package: Path) -> Runtime:
    return Runtime.load(tiny_package, check_hashes=False)


def one_loop(package: Path, tmp_path: Path) -> Path:
    """The package as if its model had been made for one loop."""
    copy = Path(shutil.copytree(package, tmp_path / "one loop"))
    content = json.loads((copy / "manifest.json").read_text())
    content["loops"] = content["model"]["total_ut_steps"] = 1
    (copy / "manifest.json").write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize("way", ASKS)
def test_python_is_warned_once_at_the_line_that_asked(runtime: Runtime, way: str) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            ASKS[way](runtime, loops=9)
    assert [str(one.message) for one in told] == [TOLD]
    assert told[0].filename == __file__


@pytest.mark.parametrize("way", ASKS)
def test_loops_that_were_trained_are_no_reason_to_warn(runtime: Runtime, way: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loops in (None, 1, 4):
            ASKS[way](runtime, loops=loops)


def test_every_reply_says_it(runtime: Runtime) -> None:
    with pytest.warns(MeltWarning):
        found = runtime.generate([[5, 6], [7]], loops=9, **SHORT)
    with Scheduler(runtime, 1) as scheduler, warnings.catch_warnings():
        warnings.simplefilter("error")
        found.append(scheduler.submit(Request((5,), runtime.options(loops=9, **SHORT))).result(60))
    assert [one.warnings for one in found] == [(TOLD,)] * 3
    assert runtime.generate([5], **SHORT).warnings == ()


def test_a_model_of_one_loop_says_so(tiny_package: Path, tmp_path: Path) -> None:
    runtime = Runtime.load(one_loop(tiny_package, tmp_path))
    assert runtime.options(loops=3).warnings[0].startswith("loops is 3, but the model was trained for 1 loop per token")
    assert runtime.options().warnings == ()


def test_the_command_line_says_it_once_on_standard_error(tiny_package: Path) -> None:
    done = process("generate", tiny_package, "abc", "--loops", 9, "--max-tokens", 3)
    assert (done.returncode, done.stderr) == (0, f"Warning: {TOLD}\n")
    quiet = process("generate", tiny_package, "abc", "--loops", 4, "--max-tokens", 3)
    assert (quiet.returncode, quiet.stderr) == (0, "")


def test_a_chat_says_it_once_for_each_depth(tiny_package: Path) -> None:
    lines = "hello\n/loops 9\nhello\n/loops 4\nhello\n/loops 9\nhello\n/loops 10\n"
    told = run("chat", tiny_package, "--max-tokens", 2, stdin=lines).stderr
    assert (told.count(TOLD), told.count("Warning: ")) == (1, 2)
    assert run("chat", tiny_package, "--loops", 9, "--max-tokens", 2, stdin="hello\nhello\n").stderr.count(TOLD) == 1


def test_a_conversation_that_thinks_deeper_is_told(runtime: Runtime) -> None:
    from melt_runtime.session.conversation import Conversation

    conversation = Conversation(runtime.session(**SHORT))
    with pytest.warns(MeltWarning, match="loops is 9"):
        conversation.think(9)
    said(conversation, "hello")
