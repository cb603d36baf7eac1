"""``melt-run chat``: a conversation in the terminal, and its commands."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

from ..errors import ArgumentError, PromptError, SessionError
from ..session.conversation import Conversation
from ..session.session import Session
from .errors import for_terminal, one_line
from .inspect import untrained_warnings

HELP = """\
  /loops N    think N loops a token from now on; without N: say how many
  /history    show the conversation
  /save FILE  keep the conversation in a file
  /load FILE  go on with a kept conversation, and the options it had
  /reset      forget the conversation
  /help       show this
  /quit       leave (so does Ctrl-D)
  Ctrl-C      stop the answer; what came of it stays in the conversation"""


class Chat:
    """Answers on standard output, notices on standard error.

    session: of a package with a chat template. system: a message that every conversation begins with, or None.
    variables: what the template is given beside the messages.
    """

    def __init__(self, session: Session, system: str | None = None, variables: Mapping[str, Any] | None = None):
        self.conversation = Conversation(session, system, notice, variables)

    def run(self) -> None:
        """Reads messages until the end of input or /quit. Raises MeltError where going on makes no sense."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            with suppress(ImportError):  # line editing and what was typed before, where the platform has it
                import readline  # noqa: F401
            for warning in untrained_warnings(self.conversation.session.runtime.manifest):
                notice(f"Warning: {warning}")
            notice(f"{self._loops()}; /help lists the commands")
        while True:
            try:
                line = input("> " if interactive else "").strip()
                if line == "/quit":
                    return
                with held_interrupts() as stopped:
                    if re.fullmatch(r"/[a-z]+( .*)?", line):
                        self._command(line)
                    elif line:
                        self._answer(line, stopped)
            except EOFError:
                if interactive:
                    print()
                return
            except KeyboardInterrupt:
                notice("\n/quit or Ctrl-D leaves")
            except (PromptError, ArgumentError, SessionError) as error:
                notice(one_line(error))

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/loops":
            if argument:
                loops = int(argument) if re.fullmatch(r"-?[0-9]{1,9}", argument) else argument
                self.conversation.think(loops)  # type: ignore[arg-type]
            notice(self._loops())
        elif name == "/history":
            for message in self.conversation.messages:
                notice(f"{message.role}: {message.content}")
        elif name == "/save":
            self.conversation.save(_file(name, argument))
            notice(f"kept: {self._size()}")
        elif name == "/load":
            self.conversation.load(_file(name, argument))
            notice(f"going on: {self._size()}; {self._loops()}")
        elif name == "/reset":
            self.conversation.forget()
            notice("the conversation is forgotten")
        else:
            notice(HELP if name == "/help" else f"there is no command {name}; /help lists them")

    def _answer(self, text: str, stopped: Callable[[], bool]) -> None:
        count = 0
        for delta in self.conversation.answer(text, stopped):
            count += 1
            _write(delta)
        if not stopped():
            _write("\n")
        elif count:
            _write("\n")
            notice("stopped")
        else:
            notice("\nstopped before the first word; the message is forgotten")

    def _loops(self) -> str:
        return f"{self.conversation.loops.loops} loops a token"

    def _size(self) -> str:
        return f"{len(self.conversation.messages)} messages, {len(self.conversation.session)} tokens"


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """While it lasts, Ctrl-C is noted instead of raised, so that nothing is left half-way; gives a function that says
    whether it came. A second one raises KeyboardInterrupt. For the main thread."""
    came = False

    def note(number: int, frame: object) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)


def notice(text: str) -> None:
    """What is no answer, on standard error."""
    typer.secho(for_terminal(text, sys.stderr), err=True, dim=True)


def _file(command: str, argument: str) -> Path:
    if not argument:
        raise ArgumentError(f"{command} needs the name of a file")
    return Path(argument).expanduser()


def _write(text: str) -> None:
    sys.stdout.write(for_terminal(text, sys.stdout))
    sys.stdout.flush()
