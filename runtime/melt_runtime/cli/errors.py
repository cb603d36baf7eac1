"""How commands end: refusals are one line on standard error and exit code 2."""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup
from typer.main import get_command

from ..errors import MeltError, MeltWarning
from ..untrusted import printable
from .variables import TRACEBACK_VARIABLE, prefix_of, unread_variables

INTERRUPTED = 130


def run_app(app: typer.Typer, name: str, refused: tuple[type[Exception], ...] = ()) -> None:
    """Run a command line and exit, its errors as ``reported_errors`` describes."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # ignored by nohup
            signal.signal(number, _end)  # so that temporary files are removed
    code = 0
    try:
        with reported_errors(name, refused):
            for sentence in unread_variables(name, lambda: get_command(app), os.environ):
                print(f"Warning: {sentence}", file=sys.stderr, flush=True)
            result = app(prog_name=name, standalone_mode=False, auto_envvar_prefix=prefix_of(name))
            code = result if isinstance(result, int) else 0
            sys.stdout.flush()  # a failed write is reported here, not by Python's own exit
    except typer.Exit as end:
        code = end.exit_code
    except Exception as error:
        message = _usage(error)
        if message is None:
            raise
        print(message if "\n" in message else f"{name}: {message}", file=sys.stderr)
        code = 2
    if code == INTERRUPTED:
        print(f"{name}: interrupted", file=sys.stderr)
    sys.exit(code)


def _end(number: int, frame: object) -> NoReturn:
    """Exit with the code of a signal's death, after cleanup."""
    sys.exit(128 + number)


class ReportedGroup(TyperGroup):
    """A command line whose commands end as ``reported_errors`` describes, however it is run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the command."""
        with reported_errors(self.name or ctx.info_name):
            return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with reported_errors(self.name or ctx.info_name):
            return super().invoke(ctx)


@contextmanager
def reported_errors(name: str, refused: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn exceptions of a command into its exit: 2 after one line for an error, 130 for Ctrl-C, silent for a closed
    pipe.

    ``refused``: errors that are refusals, not defects, besides MeltError and OSError. MELT_TRACEBACK=1 in the
    environment shows their traceback. A MeltWarning is printed as one line on standard error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", MeltWarning)
            warnings.showwarning = _show(warnings.showwarning)
            yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # Else Python would try to flush the rest at exit, and print an error.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except Exception as error:
        if (
            not isinstance(error, (MemoryError, MeltError, OSError, *refused))
            or os.environ.get(TRACEBACK_VARIABLE) == "1"
        ):
            raise
        message = "there is not enough memory" if isinstance(error, MemoryError) else one_line(error)
        print(f"{name}: {message}", file=sys.stderr)
        raise typer.Exit(2) from None


def _show(others: Callable[..., None]) -> Callable[..., None]:
    """Return a function that shows warnings. ``others``: shows other categories."""

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, MeltWarning):
            print(f"Warning: {message}", file=sys.stderr, flush=True)
        else:
            others(message, category, *where)

    return show


def one_line(error: BaseException) -> str:
    """Return an error's message as one printable line, because parts of it may be untrusted. OSErrors name the file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return printable(f"{os.fsdecode(error.filename)}: {error.strerror}")
    return printable(" ".join(str(error).split())) or type(error).__name__


def for_terminal(text: str, stream: TextIO) -> str:
    """Return text for a stream: on a terminal, without escape sequences and the like, which a model may produce."""
    return printable(text, kept="\n\t") if stream.isatty() else text


def _usage(error: Exception) -> str | None:
    """Return the command line library's message about a wrong option (or its help, without a command); None for other
    errors."""
    describe = getattr(error, "format_message", None)
    if describe is None:
        return None
    # Where pydantic is installed, it checks the values, and says first what kind of error its own is.
    return re.sub(r"^(Invalid value for [^:]*: )(Value|Assertion) error, ", r"\1", str(describe()))
