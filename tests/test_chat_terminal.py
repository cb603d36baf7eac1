"""``melt-run chat`` in a real terminal: typed at, interrupted, left, and taken up again."""

from __future__ import annotations

import os
import re
import select
import struct
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any, Self

import numpy as np
import pytest
from melt_runtime import Runtime
from melt_runtime.session import file as session_file

fcntl, termios = (pytest.importorskip(name, reason="needs a pseudo-terminal") for name in ("fcntl", "termios"))

_COLOUR = re.compile(r"\x1b\[[0-9]*m")
WAIT = 120.0  # seconds after which a test gives up
# The first answer is slow, so that there is time to stop it; all else is the command itself.
PROGRAM = """
import fcntl, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from melt_runtime.decoding.generator import TokenSequence
sample = TokenSequence.sample
def slowly(sequence, *arguments):
    if sequence.prompt_tokens < 30:
        time.sleep(0.1)
    return sample(sequence, *arguments)
TokenSequence.sample = slowly
from melt_runtime.cli.main import main
main()
"""


class Terminal:
    """A ``melt-run chat`` process whose terminal this is."""

    def __init__(self, package: Path, *options: object):
        self.master, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 50, 1000, 0, 0))  # long lines are not broken
        command = [sys.executable, "-c", PROGRAM, "chat", str(package), *map(str, options)]
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(terminal)
        self.shown = ""

    def until(self, word: str, more: int = 0) -> str:
        """Waits for a word and ``more`` characters behind it; what was shown up to there, which is taken away."""
        assert self.comes(word, more, WAIT), self.shown
        found, _, self.shown = self.shown.partition(word)
        return found

    def comes(self, word: str, more: int = 0, seconds: float = 0) -> bool:
        """Whether a word and ``more`` characters behind it are shown within some seconds."""
        end = monotonic() + seconds
        while (at := self.shown.find(word)) < 0 or len(self.shown) < at + len(word) + more:
            ready, _, _ = select.select([self.master], [], [], max(end - monotonic(), 0))
            if not ready:
                return False
            self.shown = _COLOUR.sub("", self.shown + os.read(self.master, 1 << 16).decode())
        return True

    def type(self, keys: str) -> None:
        """Presses keys."""
        os.write(self.master, keys.encode())

    def interrupt(self, word: str) -> str:
        """Presses Ctrl-C and waits for ``word``; again every second, as a user would: between showing a prompt and
        waiting for a key, Python's readline module has a moment in which a signal waits for the next key."""
        for _ in range(int(WAIT)):
            self.type("\x03")
            if self.comes(word, seconds=1):
                return self.until(word)
        raise AssertionError(self.shown)

    def ask(self, text: str) -> str:
        """Types a line and waits for what comes of it, up to the next prompt."""
        self.type(f"{text}\r")
        self.until(f"{text}\r\n")
        return self.until("> ").removesuffix("\r\n")

    def answer(self, text: str) -> str:
        """Types a message; its answer without the line about its speed."""
        answer, _, speed = self.ask(text).rpartition("\r\n")
        assert re.fullmatch(r"[0-9]+ tokens, [0-9.]+ tokens/s", speed)
        return answer

    def __enter__(self) -> Self:
        self.until("> ")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(WAIT)
        os.close(self.master)


def test_an_interrupted_conversation_is_kept_left_and_goes_on_with_the_same_tokens(
    tiny_package: Path, tmp_path: Path
) -> None:
    files = {name: tmp_path / name for name in ("before", "one", "other")}
    with Terminal(tiny_package, "--max-tokens", 40, "--temperature", 1, "--seed", 3) as terminal:
        terminal.type("hello\r")
        terminal.until("hello\r\n", more=3)
        terminal.type("\x03")
        begun = terminal.until("\r\nstopped").replace("^C", "")
        terminal.until("> ")
        assert len(terminal.answer("and more")) > 5
        assert "kept: 4 messages" in terminal.ask(f"/save {files['before']}")
        answer = terminal.answer("the third")
        terminal.ask(f"/save {files['one']}")
        terminal.type("/quit\r")
        assert terminal.process.wait(WAIT) == 0
    with Terminal(tiny_package, "--max-tokens", 3) as terminal:
        assert "going on: 4 messages" in terminal.ask(f"/load {files['before']}")
        assert f"user: hello\r\nassistant: {begun}\r\n" in terminal.ask("/history")
        assert terminal.answer("the third") == answer
        terminal.ask(f"/save {files['other']}")
        terminal.type("\x10\x10\r")  # back to what was typed before
        terminal.until("\r\n")
        terminal.until("> ")
        assert terminal.ask("/history").count("user: the third\r\n") == 2
        terminal.interrupt("/quit or Ctrl-D leaves")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(WAIT) == 0
    assert 3 <= len(begun) < 40
    assert len(answer) > 5
    one, other = (saved(tiny_package, files[name]) for name in ("one", "other"))
    assert (one.messages, one.pending, one.random) == (other.messages, other.pending, other.random)
    assert np.array_equal(one.tokens, other.tokens)
    assert all(np.array_equal(values, other.positions[name]) for name, values in one.positions.items())
    runtime = Runtime.load(tiny_package)
    first = runtime.chat_prompt([{"role": "user", "content": "hello"}])
    assert runtime.generate(first, max_tokens=40, temperature=1.0, seed=3).text.startswith(begun)


def saved(package: Path, file: Path) -> Any:
    runtime = Runtime.load(package)
    return session_file.read(file, runtime.package, runtime.options)
