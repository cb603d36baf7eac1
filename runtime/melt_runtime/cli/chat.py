"""``melt-run chat``: a chat in the terminal, and its commands."""

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
from ..package.manifest_facts import untrained_warnings
from ..session.conversation import Conversation
from ..session.session import Session
from .errors import for_terminal, one_line

HELP = """\
  /loops N    use N loops per token from now on; without N: show the number
  /history    show the conversation
  /save FILE  save the conversation to a file
  /load FILE  continue a saved conversation with its options
  /reset      forget the conversation
  /help       show this
  /quit       leave (so does Ctrl-D)
  Ctrl-C      stop the answer; its text so far stays in the conversation"""


class Chat:
    """A chat with answers on standard output and notices on standard error.

    ``session``: of a package with a chat template. ``system``: the first message of every conversation, or None.
    ``variables``: further variables for the chat template.
    """

    def __init__(self, session: Session, system: str | None = None, variables: Mapping[str, Any] | None = None):
        self.conversation = Conversation(session, system, notice, variables)

    def run(self) -> None:
        """Read messages until the end of input or /quit. Raises MeltError if the chat cannot go on."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            with suppress(ImportError):  # line editing and history, where the platform has it
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
        return f"{self.conversation.loops.loops} loops per token"

    def _size(self) -> str:
        return f"{len(self.conversation.messages)} messages, {len(self.conversation.session)} tokens"


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C for the length of the block, so that nothing is left half-done; yields a function that tells whether
    it came.

    A second one raises KeyboardInterrupt. For the main thread.
    """
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
    """Print a notice on standard error."""
    typer.secho(for_terminal(text, sys.stderr), err=True, dim=True)


def _file(command: str, argument: str) -> Path:
    if not argument:
        raise ArgumentError(f"{command} needs the name of a file")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:  # of a user whom the system does not know
        raise ArgumentError(f"{command} {argument}: {error}") from error


def _write(text: str) -> None:
    sys.stdout.write(for_terminal(text, sys.stdout))
    sys.stdout.flush()
