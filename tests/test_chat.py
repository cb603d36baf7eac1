"""``melt-run chat``: turns that run only what is new, commands, interruptions, and a conversation kept in a file."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import LoopDriver, Package, Runtime, Session, TextDelta
from melt_runtime.backends import onnxruntime_cpu as backend_module
from melt_runtime.cli.chat import read_message
from melt_runtime.session.conversation import Conversation
from test_run_cli import letters, refused, run

SAMPLED: dict[str, Any] = {"temperature": 1.2, "top_k": 30, "seed": 4}


@pytest.fixture(scope="module")
def runtime(tiny_package: Path) -> Runtime:
    return Runtime.load(tiny_package)


@pytest.fixture
def prompt(tiny_package: Path) -> str:
    return letters(tiny_package)[:5]


def said(conversation: Conversation, text: str) -> str:
    return "".join(conversation.answer(text))


def chat_ids(runtime: Runtime, *contents: str, system: str | None = None) -> list[int]:
    """The prompt of a chat whose user and assistant say these in turn."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]
    return runtime.chat_prompt([*opening, *turns])


def continued(session: Session, ids: list[int], **options: Any) -> str:
    """An answer of a session that is brought to a prompt by hand: what is common stays, the rest is appended."""
    tokens = session.tokens
    known = next((at for at, token in enumerate(tokens) if at == len(ids) or token != ids[at]), len(tokens))
    session.truncate(known)
    session.append(ids[known:], **options)
    return session.generate(**options).text


# Turns


def test_it_answers_and_obeys(runtime: Runtime, tiny_package: Path, prompt: str) -> None:
    session, other = runtime.session(max_tokens=4), prompt[::-1]
    first = continued(session, chat_ids(runtime, prompt), loops=2)
    second = continued(session, chat_ids(runtime, prompt, first, other), loops=3)
    assert first == runtime.generate(chat_ids(runtime, prompt), max_tokens=4, loops=2).text
    script = ["/help", "/loops 2", prompt, "/loops 3", "", other, "/loops", "/history", "/quit", "never"]
    result = run("chat", tiny_package, "--max-tokens", 4, stdin="\n".join(script) + "\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{first}\n{second}\n"
    assert "/reset" in result.stderr
    assert result.stderr.count("3 loops per token") == 2
    history = [f"user: {prompt}", f"assistant: {first}", f"user: {other}", f"assistant: {second}"]
    assert result.stderr.splitlines()[-4:] == history


@pytest.mark.parametrize("options", [{}, SAMPLED, {"exit_threshold": 0.7}, {"chunk": 3}], ids=str)
def test_a_turn_runs_only_what_is_new(
    runtime: Runtime, prompt: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(runtime.session(max_tokens=6, ignore_eos=True, **options), system="be brief")
    first = said(conversation, prompt)
    before, ran = conversation.session.tokens, list[int]()
    advance = LoopDriver.advance
    monkeypatch.setattr(
        LoopDriver,
        "advance",
        lambda self, tokens, settings, **how: ran.append(len(tokens[0])) or advance(self, tokens, settings, **how),
    )
    said(conversation, "next")
    prompt_ids = chat_ids(runtime, prompt, first, "next", system="be brief")
    assert conversation.session.tokens[: len(prompt_ids)] == tuple(prompt_ids)
    if "seed" in options:  # a token without text was drawn, and behind it the text reads otherwise
        known = next(at for at, token in enumerate(before) if token != prompt_ids[at])
        assert sum(ran) == len(prompt_ids) - known + 5  # all that were drawn now but the last
        assert known > len(chat_ids(runtime, prompt, system="be brief"))
    else:
        assert prompt_ids[: len(before)] == list(before)
        assert sum(ran) == len(prompt_ids) - len(before) + 1 + 5  # and the last that was drawn before


def test_an_answer_is_that_of_a_session_brought_there_by_hand(runtime: Runtime, prompt: str) -> None:
    conversation = Conversation(runtime.session(max_tokens=7, **SAMPLED))
    by_hand, history = runtime.session(max_tokens=7, **SAMPLED), list[str]()
    for text in (prompt, "and", "more"):
        history += [text, said(conversation, text)]
        assert continued(by_hand, chat_ids(runtime, *history[:-1])) == history[-1]
    assert conversation.session.tokens == by_hand.tokens
    assert conversation.session.chunks == by_hand.chunks


def test_reset_forgets_all_but_the_system_message(runtime: Runtime, tiny_package: Path, prompt: str) -> None:
    answer = runtime.generate(chat_ids(runtime, prompt, system=prompt), max_tokens=4).text
    script = f"{prompt}\n/reset\n{prompt}\n"
    result = run("chat", tiny_package, "--system", prompt, "--max-tokens", 4, stdin=script)
    assert result.exit_code == 0, result.output
    assert result.stdout == 2 * f"{answer}\n"


def test_mistakes_do_not_end_it(tiny_package: Path, prompt: str, tmp_path: Path) -> None:
    too_long = prompt * Package.open(tiny_package).manifest.max_seq_len
    script = [
        "/loops 0",
        "/loops many",
        "/fly high",
        "/Fly",
        too_long,
        "/save",
        "/load",
        f"/load {tmp_path}/none",
        prompt,
    ]
    script.append(f"/save {tmp_path}/no/such/folder/file")
    result = run("chat", tiny_package, "--max-tokens", 2, stdin="\n".join(script))
    assert result.exit_code == 0, result.output
    expected = (
        "loops is 0",
        "loops is 'many'",
        "no command /fly; there are /loops,",
        "no command /fly",
        "do not fit: the cache has room for 256",
    )
    expected += ("/save needs", "/load needs", "there is no saved session", "cannot be written")
    for what, line in zip(expected, result.stderr.splitlines(), strict=True):
        assert what in line
    assert result.stdout.endswith("\n")


def test_a_message_that_is_too_long_leaves_the_conversation_as_it_was(runtime: Runtime, prompt: str) -> None:
    conversation = Conversation(runtime.session(max_tokens=4))
    said(conversation, prompt)
    messages, tokens = conversation.messages, conversation.session.tokens
    with pytest.raises(ValueError, match="do not fit"):
        said(conversation, "a" * 300)
    assert (conversation.messages, conversation.session.tokens) == (messages, tokens)


def test_the_oldest_exchange_is_dropped(
    runtime: Runtime, tiny_package: Path, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacity = runtime.manifest.max_seq_len
    quarter = (prompt * capacity)[: capacity // 4]
    asked: list[int] = []

    def deltas(session: Session, **_: object) -> Iterator[TextDelta]:
        asked.append(len(session))
        return iter([TextDelta(0, prompt, 5, "stop", 4)])

    monkeypatch.setattr(Session, "deltas", deltas)
    result = run("chat", tiny_package, "--system", prompt, "--max-tokens", 8, stdin=f"{quarter}\n" * 8)
    assert result.exit_code == 0, result.output
    assert len(asked) == 8
    assert max(asked) <= capacity - 8
    assert "the oldest exchange dropped" in result.stderr
    lengths = [len(chat_ids(runtime, *[quarter, prompt] * count, quarter, system=prompt)) for count in range(8)]
    assert asked[-1] == max(length for length in lengths if length <= capacity - 8)


def test_answers_go_on_behind_a_full_cache(runtime: Runtime, prompt: str) -> None:
    told: list[str] = []
    conversation = Conversation(runtime.session(max_tokens=60, ignore_eos=True), notice=told.append)
    for _ in range(6):
        assert len(said(conversation, prompt)) > 0
        assert len(conversation.session) <= runtime.manifest.max_seq_len + 1
    assert told
    fresh = Conversation(runtime.session(max_tokens=60, ignore_eos=True))
    fresh.turns = conversation.turns[-2:]
    for one in (conversation, fresh):
        one.turns = one.turns[-2:]
        one.session.reset()
    assert said(conversation, prompt) == said(fresh, prompt)


def test_a_looplm_that_thinks_deeper_runs_again_what_ran_too_few_loops(
    make_looplm: MakeCheckpoint, make_package: MakePackage, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looplm, tokenizer = Runtime.load(make_package(make_looplm(), chunk=8)), Runtime.load(make_package(tiny_checkpoint))
    monkeypatch.setattr(looplm, "tokenizer", tokenizer.tokenizer)
    conversation = Conversation(looplm.session(max_tokens=4, ignore_eos=True, loops=2))
    first = said(conversation, "abc")
    conversation.think(3)
    second = said(conversation, "def")
    whole = looplm.session(max_tokens=4, ignore_eos=True)
    assert continued(whole, chat_ids(looplm, "abc", first, "def"), loops=3) == second
    assert set(conversation.session.depth) == {3}


def test_memory_that_is_not_there_is_refused_before_the_first_message(
    runtime: Runtime, tiny_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = runtime.memory().session_bytes
    monkeypatch.setattr(backend_module, "available_memory", lambda: needed - 1)
    assert f"needs {needed:,} bytes" in refused(run("chat", tiny_package, stdin="a\n"))


def test_options_are_refused(tiny_package: Path) -> None:
    assert "loops is 0" in refused(run("chat", tiny_package, "--loops", 0, stdin=""))


# Interruptions


def test_an_interrupt_stops_the_answer_alone(
    runtime: Runtime, tiny_package: Path, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    deltas = Session.deltas

    def interrupted(session: Session, **options: Any) -> Iterator[TextDelta]:
        asked.append(session.tokens)
        for count, delta in enumerate(deltas(session, **options)):
            if len(asked) == 1 and count == 2:
                signal.raise_signal(signal.SIGINT)
            yield delta

    monkeypatch.setattr(Session, "deltas", interrupted)
    result = run("chat", tiny_package, "--max-tokens", 9, stdin=f"{prompt}\n{prompt}\n")
    assert result.exit_code == 0, result.output
    assert result.stderr == "stopped\n"
    first, second = result.stdout.splitlines()
    assert first == runtime.generate(chat_ids(runtime, prompt), max_tokens=3).text
    assert asked[1] == tuple(chat_ids(runtime, prompt, first, prompt))
    assert len(second) > len(first)


def test_an_interrupt_before_the_first_word_forgets_the_message(
    runtime: Runtime, tiny_package: Path, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, left = Session.append, [1]

    def interrupted(session: Session, ids: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        append(session, ids, **options)

    monkeypatch.setattr(Session, "append", interrupted)
    result = run("chat", tiny_package, "--max-tokens", 4, stdin=f"{'long ' * 9}\n/history\n{prompt}\n")
    assert result.exit_code == 0, result.output
    assert result.stderr.split("\n") == ["", "stopped before the first word; the message is forgotten", ""]
    assert result.stdout == runtime.generate(chat_ids(runtime, prompt), max_tokens=4).text + "\n"


def test_an_interrupt_at_the_prompt_says_how_to_leave(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([KeyboardInterrupt(), "/loops"])

    def read(_: str) -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    result = run("chat", tiny_package)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[1:] == ["/quit or Ctrl-D leaves", "4 loops per token"]


@pytest.mark.parametrize("place", [1, 2, 4])
def test_an_answer_torn_off_in_the_middle_of_a_step_leaves_a_conversation_that_goes_on(
    runtime: Runtime, prompt: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(runtime.session(max_tokens=8, ignore_eos=True))
    count, left = LoopDriver._count, [place]

    def torn(driver: LoopDriver, *arguments: Any) -> None:
        left[0] -= 1
        driver.lengths += 3  # books that do not agree
        if left[0] == 0:
            raise KeyboardInterrupt
        driver.lengths -= 3
        count(driver, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LoopDriver, "_count", torn)
        with pytest.raises(KeyboardInterrupt):
            said(conversation, prompt)
    kept = [message.content for message in conversation.messages]
    expected = runtime.session(max_tokens=8, ignore_eos=True)
    assert said(conversation, "on") == continued(expected, chat_ids(runtime, *kept, "on"))


# Changes of mind


def test_a_question_is_undone_and_answered_anew(runtime: Runtime, tiny_package: Path, prompt: str) -> None:
    script = ["/undo", "/retry", prompt, "wrong", "/undo", "/retry", "next", "/history"]
    result = run("chat", tiny_package, "--max-tokens", 4, stdin="\n".join(script))
    assert result.exit_code == 0, result.output
    first = runtime.generate(chat_ids(runtime, prompt), max_tokens=4).text
    second = runtime.generate(chat_ids(runtime, prompt, first, "next"), max_tokens=4).text
    answers = result.stdout.splitlines()
    assert [answers[0], *answers[2:]] == [first, first, second]
    assert result.stderr.count("the conversation has no question yet") == 2
    assert "forgotten: wrong" in result.stderr
    history = [f"user: {prompt}", f"assistant: {first}", "user: next", f"assistant: {second}"]
    assert result.stderr.splitlines()[-4:] == history


def test_an_answer_anew_that_gets_no_word_leaves_the_old_one(runtime: Runtime, prompt: str) -> None:
    conversation = Conversation(runtime.session(max_tokens=4))
    said(conversation, prompt)
    before = conversation.messages
    assert list(conversation.retry(lambda: True)) == []
    assert conversation.messages == before
    assert "".join(conversation.retry()) == before[-1].content


def test_a_sampled_answer_is_another_when_retried_and_the_temperature_can_change(
    runtime: Runtime, tiny_package: Path, prompt: str
) -> None:
    script = [prompt, "/temperature 1.5", "/retry", "/retry", "/temperature", "/temperature 0", "/retry"]
    script += ["/temperature -1", "/temperature hot", "/temperature nan"]
    result = run("chat", tiny_package, "--max-tokens", 12, "--seed", 3, stdin="\n".join(script))
    assert result.exit_code == 0, result.output
    likeliest, one, other, again = result.stdout.splitlines()
    assert likeliest == again == runtime.generate(chat_ids(runtime, prompt), max_tokens=12).text
    assert len({likeliest, one, other}) == 3
    lines = result.stderr.splitlines()
    assert lines[:3] == ["temperature 1.5", "temperature 1.5", "temperature 0"]
    assert "not -1.0" in lines[3]
    assert "needs a number, not 'hot'" in lines[4]
    assert "not nan" in lines[5]


def test_the_system_message_can_change_within_a_conversation(runtime: Runtime, tiny_package: Path, prompt: str) -> None:
    script = ["/system", "/system be brief", prompt, "/system none", "/retry"]
    result = run("chat", tiny_package, "--max-tokens", 4, stdin="\n".join(script))
    assert result.exit_code == 0, result.output
    expected = [
        runtime.generate(chat_ids(runtime, prompt, system=system), max_tokens=4).text for system in ("be brief", None)
    ]
    assert result.stdout.splitlines() == expected
    assert result.stderr.splitlines() == ["no system message", "system: be brief", "no system message"]


def test_commands_may_have_capitals_and_those_without_an_argument_refuse_one(tiny_package: Path, prompt: str) -> None:
    script = ["/Loops 2", "/LOOPS\t3", prompt, "/reset the model", "/quit now", "/History", "/HELP", "/QUIT", prompt]
    result = run("chat", tiny_package, "--max-tokens", 2, stdin="\n".join(script))
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1  # one message
    said = result.stderr.splitlines()
    assert said[:2] == ["2 loops per token", "3 loops per token"]
    assert "/reset stands alone" in said[2]
    assert "/quit stands alone" in said[3]
    assert said[4] == f"user: {prompt}"
    assert "/reset" in "".join(said[6:])


@pytest.mark.parametrize("typed", ["/usr/bin is a folder", '"""/quit"""', '"""\n/Etc has files\n"""', "/ 2", "//"])
def test_a_message_may_begin_with_a_slash(typed: str, tiny_package: Path) -> None:
    result = run("chat", tiny_package, "--max-tokens", 2, stdin=f"{typed}\n/history\n")
    assert result.exit_code == 0, result.output
    message = typed.strip('"').strip()
    assert result.stderr.splitlines()[0] == f"user: {message}"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ('"""one\n\n  two"""', "one\n\n  two"),
        ('"""\none\n/quit\n"""', "one\n/quit"),
        ('"""one"""', "one"),
        ("one\\\ntwo\\\nthree", "one\ntwo\nthree"),
        ('"""one\ntwo', "one\ntwo"),
        ("one\\", "one"),
    ],
)
def test_a_message_may_have_several_lines(typed: str, meant: str) -> None:
    lines = iter(typed.split("\n"))

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    assert read_message(read).text == meant
