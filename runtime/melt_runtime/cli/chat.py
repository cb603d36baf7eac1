"""``melt-run chat``: a chat in the terminal, and its commands."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import typer

from ..errors import ArgumentError, PromptError, SessionError
from ..package.manifest_facts import untrained_warnings
from ..session.conversation import Conversation
from ..session.session import Session
from .errors import for_terminal, one_line

HELP = """\
  /loops N        use N loops per token from now on; without N: show the number
  /temperature T  sample at this temperature from now on (0: the likeliest token); without T: show it
  /system TEXT    begin with this system message from now on; none: with no message; without TEXT: show it
  /retry          answer the last question anew
  /undo           forget the last question and its answer
  /history        show the conversation
  /save FILE      save the conversation to a file
  /load FILE      continue a saved conversation with its options and its system message
  /reset          forget the conversation
  /help           show this
  /quit           leave (so does Ctrl-D)
  Several lines   begin with \"\"\" and end with it, or end each line but the last with \\
  \"\"\"/word\"\"\"     a message that begins as a command does; one such as /usr/bin needs no quotes
  Ctrl-C          stop the answer; its text so far stays in the conversation"""
QUOTES = '"""'
_COMMANDS = re.findall(r"^  (/[a-z]+)", HELP, re.MULTILINE)
_WITH_ARGUMENT = ("/loops", "/temperature", "/system", "/save", "/load")


class Typed(NamedTuple):
    """What was typed. ``quoted``: between triple quotes, so that it is no command."""

    text: str
    quoted: bool = False

    @property
    def command(self) -> tuple[str, str] | None:
        """The command, in small letters, and its argument; None: it is a message."""
        found = None if self.quoted else re.fullmatch(r"(/\w+)(?:\s+(.*))?", self.text, re.DOTALL)
        return None if found is None else (found[1].lower(), found[2] or "")


class Chat:
    """A chat with answers on standard output and notices on standard error.

    ``session``: of a package with a chat template. ``system``: the first message of every conversation, or None.
    ``variables``: further variables for the chat template.
    """

    def __init__(self, session: Session, system: str | None = None, variables: Mapping[str, Any] | None = None):
        self.conversation = Conversation(session, system, notice, variables)
        self.interactive = False

    def run(self) -> None:
        """Read messages until the end of input or /quit. Raises MeltError if the chat cannot go on."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            with suppress(ImportError):  # line editing and history, where the platform has it
                import readline  # noqa: F401
            for warning in untrained_warnings(self.conversation.session.runtime.manifest):
                notice(f"Warning: {warning}")
            notice(f"{self._loops()}; /help lists the commands")
        self.interactive = interactive
        while True:
            try:
                typed = read_message(lambda prompt: input(prompt if interactive else ""))
                if typed.command == ("/quit", ""):
                    return
                with held_interrupts() as stopped:
                    if typed.command is not None:
                        self._command(*typed.command, stopped)
                    elif typed.text:
                        self._write_answer(self.conversation.answer(typed.text, stopped), stopped)
            except EOFError:
                if interactive:
                    print()
                return
            except KeyboardInterrupt:
                notice("\n/quit or Ctrl-D leaves")
            except (PromptError, ArgumentError, SessionError) as error:
                notice(one_line(error))

    def _command(self, name: str, argument: str, stopped: Callable[[], bool]) -> None:
        if name not in _COMMANDS:
            known = ", ".join(_COMMANDS)
            raise ArgumentError(f"no command {name}; there are {known}; a message that begins so goes between {QUOTES}")
        if argument and name not in _WITH_ARGUMENT:
            raise ArgumentError(f"{name} stands alone; a message that begins so goes between {QUOTES}")
        if name == "/loops":
            if argument:
                loops = int(argument) if re.fullmatch(r"-?[0-9]{1,9}", argument) else argument
                self.conversation.think(loops)  # type: ignore[arg-type]
            notice(self._loops())
        elif name == "/temperature":
            if argument:
                self.conversation.heat(_number(name, argument))
            notice(f"temperature {self.conversation.session.sampler.params.temperature:g}")
        elif name == "/system":
            if argument:
                self.conversation.system = None if argument == "none" else argument
            system = self.conversation.system
            notice("no system message" if system is None else f"system: {system}")
        elif name == "/retry":
            self._write_answer(self.conversation.retry(stopped), stopped, "the answer before stays")
        elif name == "/undo":
            notice(f"forgotten: {self.conversation.undo()}")
        elif name == "/history":
            for message in self.conversation.messages:
                notice(f"{message.role}: {message.content}")
        elif name == "/save":
            self.conversation.save(_file(name, argument))
            notice(f"kept: {self._size()}")
        elif name == "/load":
            self._load(_file(name, argument))
        elif name == "/reset":
            self.conversation.forget()
            notice("the conversation is forgotten")
        else:
            notice(HELP)

    def _load(self, file: Path) -> None:
        """Continue a saved conversation, and name the system message that it takes the place of."""
        before = self.conversation.system
        self.conversation.load(file)
        notice(f"going on: {self._size()}; {self._loops()}")
        now = self.conversation.system
        if before not in (None, now):
            instead = "the file has none" if now is None else f"the file's is used: {now}"
            notice(f"the system message so far is dropped: {before}; {instead}")

    def _write_answer(
        self, texts: Iterator[str], stopped: Callable[[], bool], unsaid: str = "the message is forgotten"
    ) -> None:
        """Write an answer as it comes. ``unsaid``: what becomes of a question that got no word."""
        first, last, count = 0.0, 0.0, 0
        for text in texts:
            last = monotonic()
            first = first or last
            count += 1
            _write(text)
        if not stopped():
            _write("\n")
        elif count:
            _write("\n")
            notice("stopped")
        else:
            notice(f"\nstopped before the first word; {unsaid}")
        if self.interactive and count > 1 and last > first:
            tokens = self.conversation.answered
            notice(f"{tokens} tokens, {(tokens - 1) / (last - first):.1f} tokens/s")

    def _loops(self) -> str:
        return f"{self.conversation.loops.loops} loops per token"

    def _size(self) -> str:
        return f"{len(self.conversation.messages)} messages, {len(self.conversation.session)} tokens"


def read_message(read: Callable[[str], str]) -> Typed:
    """Read a message: a line, lines that end with a backslash, or lines between triple quotes. Raises EOFError at the
    end of input, unless a message has begun.

    ``read``: called with the prompt of each line.
    """
    first = read("> ")
    lines = [first]
    quoted = first.lstrip().startswith(QUOTES)

    def open_still() -> bool:
        if not quoted:
            return lines[-1].endswith("\\")
        rest = lines[0].lstrip().removeprefix(QUOTES) if len(lines) == 1 else lines[-1]
        return not rest.rstrip().endswith(QUOTES)

    with suppress(EOFError):
        while open_still():
            lines.append(read(". "))
    if quoted:
        return Typed("\n".join(lines).strip().removeprefix(QUOTES).removesuffix(QUOTES).strip(), quoted=True)
    return Typed("\n".join(line.removesuffix("\\") for line in lines).strip())


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


def _number(command: str, argument: str) -> float:
    try:
        return float(argument)
    except ValueError:
        raise ArgumentError(f"{command} needs a number, not {argument[:50]!r}") from None


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
