"""Ctrl-C, or no memory, at any line: no token is lost, and what follows is what would have followed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from linecache import getline
from pathlib import Path
from types import FrameType
from typing import Any

import melt_runtime
import pytest
from conftest import MakeCheckpoint, MakeFamily, MakePackage
from melt_runtime import Runtime, Session
from melt_runtime.decoding.pipeline_choice import PipelineChoice

ROOMS = tuple(str(Path(melt_runtime.__file__).parent / room) for room in ("decoding", "session", "backends"))
NAMES = ("decoding/loop_driver.py", "decoding/cached_tokens.py", "decoding/pipeline.py", "session/session.py")
BOOKS = tuple(str(Path(melt_runtime.__file__).parent / name) for name in NAMES)
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]  # a chunk of 8 and one of 3
MORE = [30, 31, 32]
TOKENS = 14
# What is asked of a session, by the model's kind.
ASKED: dict[str, dict[str, Any]] = {
    "melt": {},
    "melt adaptive": {"exit_threshold": 0.6},
    "melt sampled": {"temperature": 1.2, "seed": 4},
    "looplm": {"pipeline": "off"},
    "looplm pipelined": {"pipeline": "on"},
    "looplm sampled pipelined": {"pipeline": "on", "temperature": 1.2, "seed": 4},
    "looplm choosing": {},
    "staged pipelined": {"pipeline": "on"},
}


class Raised:
    """Raises an exception before one step of the code in some files, and counts the steps.

    ``place``: the number of that step; None only counts. ``finely``: the steps are bytecodes, not lines.
    """

    def __init__(self, files: tuple[str, ...], place: int | None = None, finely: bool = False):
        self.files, self.place, self.event = files, place, "opcode" if finely else "line"
        self.error: type[BaseException] = KeyboardInterrupt if place is None or place % 2 else MemoryError
        self.steps = 0

    def __enter__(self) -> Raised:
        self.before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> bool:
        sys.settrace(self.before)
        # A backend tells of missing memory in its own words.
        return self.place is not None and (
            kind is self.error or isinstance(getattr(error, "__cause__", None), self.error)
        )

    def _called(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        return self._stepped

    def _stepped(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        # A block's end is traced before its lock is released; no signal is handled between the two.
        line = getline(frame.f_code.co_filename, frame.f_lineno or 0).lstrip()
        if event == self.event and line and not line.startswith("with "):
            self.steps += 1
            if self.steps == self.place:
                raise self.error
        return self._stepped


@pytest.fixture(scope="module")
def runtimes(
    make_package: MakePackage, make_checkpoint: MakeCheckpoint, make_looplm: MakeCheckpoint, make_family: MakeFamily
) -> Any:
    """A model of each kind; "staged" has layers before and after its loops, and reads its input in every loop."""
    made = {"melt": make_checkpoint(), "looplm": make_looplm(), "staged": make_family("huginn")}
    return {name: Runtime.load(make_package(one, chunk=8), threads=1) for name, one in made.items()}


class InTurn(PipelineChoice):
    """Decodes every third token plainly."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def pipelined(self, count: int) -> bool:
        """Return whether the next token is pipelined."""
        self.asked += 1
        return self.asked % 3 > 0


def opened(runtimes: dict[str, Runtime], kind: str) -> Session:
    session = runtimes[kind.split()[0]].session(ignore_eos=True, **ASKED[kind])
    if kind.endswith("choosing"):
        session.driver.choice = InTurn()
    session.append(PROMPT)
    return session


def places(call: Callable[[], object], files: tuple[str, ...], most: int, finely: bool = False) -> Iterator[int]:
    """Yield at most so many of the steps that a call takes, at equal distances."""
    with Raised(files, finely=finely) as counted:
        call()
    assert counted.steps > 50
    yield from range(1, counted.steps + 1, max(counted.steps // most, 1))


@pytest.mark.parametrize("finely", [False, True])
@pytest.mark.parametrize("kind", ASKED)
def test_an_answer_goes_on_after_an_exception_at_any_step(
    runtimes: dict[str, Runtime], kind: str, finely: bool
) -> None:
    files = BOOKS if finely else ROOMS
    session = opened(runtimes, kind)
    start = session.sampler.state()
    session.generate(max_tokens=3)
    middle = session.sampler.state()
    clean = opened(runtimes, kind).generate(max_tokens=TOKENS)
    for place in places(lambda: opened(runtimes, kind).generate(max_tokens=2), files, 60, finely):
        session.reset()
        session.append(PROMPT)
        session.sampler.restore(start)
        session.generate(max_tokens=3)
        assert session.sampler.state() == middle
        with Raised(files, place, finely):
            session.generate(max_tokens=2)
        said = len(session) - len(PROMPT)
        assert session.tokens == (*PROMPT, *clean.token_ids[:said])
        assert len(session.depth) == int(session.driver.lengths[0])
        session.generate(max_tokens=TOKENS - said)
        assert session.tokens == (*PROMPT, *clean.token_ids), place
        assert session.depth == clean.depth, place


@pytest.mark.parametrize("kind", ["melt", "looplm pipelined"])
def test_going_back_loses_nothing_but_what_was_to_go(runtimes: dict[str, Runtime], kind: str) -> None:
    """The last chunk runs again after going back, and is the session's while it does."""
    session = opened(runtimes, kind)
    clean = session.generate(max_tokens=TOKENS)

    def back_and_on() -> None:
        session.truncate(10)
        session.generate(max_tokens=1)

    beginning = opened(runtimes, kind)
    beginning.truncate(10)
    expected = beginning.generate(max_tokens=4)
    for place in places(back_and_on, ROOMS, 600):
        session.reset()
        session.append(PROMPT)
        session.generate(max_tokens=2)
        before = session.tokens
        with Raised(ROOMS, place):
            back_and_on()
        if session.tokens == before:
            session.generate(max_tokens=TOKENS - 2)
            assert session.tokens == (*PROMPT, *clean.token_ids), place
            continue
        said = session.tokens
        assert said[:10] == tuple(PROMPT[:10]), place
        branch = session.fork()
        for one in (session, branch):
            one.generate(max_tokens=14 - len(said))
            assert one.tokens == (*PROMPT[:10], *expected.token_ids), place
            assert one.depth == expected.depth, place


@pytest.mark.parametrize("kind", ["melt", "looplm"])
def test_an_interrupted_prompt_leaves_whole_chunks(runtimes: dict[str, Runtime], kind: str, tmp_path: Path) -> None:
    session = opened(runtimes, kind)
    whole = (*PROMPT, session.generate(max_tokens=1).token_ids[0], *MORE)
    for place in places(lambda: opened(runtimes, kind).append(MORE), ROOMS, 60):
        session.reset()
        with Raised(ROOMS, place):
            session.append(PROMPT)
        assert session.tokens in (tuple(PROMPT[:count]) for count in (0, 8, 11))
        if len(session) < len(PROMPT):
            session.append(PROMPT[len(session) :])
        session.generate(max_tokens=1)
        with Raised(ROOMS, place):
            session.append(MORE)
        assert session.tokens in (whole, whole[:-3])
        session.save(tmp_path / "saved.melt")
        again = runtimes[kind].load_session(tmp_path / "saved.melt")
        assert again.tokens == session.tokens
        if len(session) < len(whole):
            session.append(MORE)
        assert session.chunks == (0, 8, 11, 12)


@pytest.mark.parametrize("kind", ["melt", "looplm"])
def test_a_runtime_answers_after_an_exception_at_any_step(runtimes: dict[str, Runtime], kind: str) -> None:
    runtime = runtimes[kind]
    asked: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True}
    expected = runtime.generate(PROMPT, **asked)
    for place in places(lambda: runtime.generate(PROMPT, **asked), ROOMS, 600):
        with Raised(ROOMS, place):
            runtime.generate(PROMPT, **asked)
        assert runtime.generate(PROMPT, **asked) == expected
