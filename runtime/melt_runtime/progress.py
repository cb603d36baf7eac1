"""Progress on standard error: a bar per named step on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# A step's name, its total (0: unknown), and the amount done since the last call.
Step = Callable[[str, int, int], None]

LINE_SECONDS = 5.0  # between two lines where there is no terminal
_BYTES_FROM = 1_000_000  # totals from here on are bytes: nothing else is counted that far


def no_progress(step: str, total: int, done: int) -> None:
    """Ignore progress."""


@contextmanager
def shown_progress(*, transient: bool = False, seconds: float | None = None) -> Iterator[Step]:
    """Show progress on standard error, through a callable of step name, total, and the amount done since its last
    call.

    ``transient``: on a terminal, the bars vanish with their end. ``seconds``: between two lines elsewhere; None:
    LINE_SECONDS.
    """
    with _bars(transient) if sys.stderr.isatty() else _lines(sys.stderr, seconds or LINE_SECONDS) as step:
        yield step


@contextmanager
def _bars(transient: bool) -> Iterator[Step]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    display = Progress(*columns, console=Console(stderr=True), transient=transient)
    tasks: dict[str, Any] = {}

    def finish() -> None:
        for task in tasks.values():
            display.update(task, total=1, completed=1)
            display.stop_task(task)

    def step(name: str, total: int, done: int) -> None:
        if not tasks:
            display.start()  # only now, so that an immediate error is shown alone
        if name not in tasks:
            finish()
            tasks[name] = display.add_task(name, total=total or None)
        display.advance(tasks[name], done)
        if transient and display.finished:
            display.stop()

    try:
        yield step
        finish()
    finally:
        if tasks:
            display.stop()


@contextmanager
def _lines(stream: TextIO, seconds: float) -> Iterator[Step]:
    """Write a line every few seconds, from a thread, because a step may take minutes between two calls."""
    lines, ended = _Lines(stream), threading.Event()

    def tick() -> None:
        while not ended.wait(seconds):
            lines.write()

    thread = threading.Thread(target=tick, name="melt-progress", daemon=True)

    def step(name: str, total: int, done: int) -> None:
        lines.advance(name, total, done)
        if thread.ident is None:
            thread.start()

    try:
        yield step
        lines.finish()
    finally:
        ended.set()


class _Lines:
    """The current step and how far it is, as a line. Thread-safe."""

    def __init__(self, stream: TextIO):
        self._stream, self._lock = stream, threading.Lock()
        self._name, self._total, self._done = "", 0, 0
        self._begun, self._written = 0.0, False

    def advance(self, name: str, total: int, done: int) -> None:
        """Count what was done; another name ends the step before."""
        with self._lock:
            if name != self._name:
                self._end()
                self._name, self._total, self._done = name, total, 0
                self._begun, self._written = monotonic(), False
            self._done += done

    def write(self) -> None:
        """Write done, total and what remains of the running step."""
        with self._lock:
            took = monotonic() - self._begun
            if not self._name or (self._total and self._done >= self._total and self._written):
                return
            text = f"{took:.0f} s so far"
            if self._total:
                text = f"{_amount(self._done, self._total)} of {_amount(self._total, self._total)}"
                text += f", {took / self._done * max(self._total - self._done, 0):.0f} s left" if self._done else ""
            self._say(text)
            self._written = True

    def finish(self) -> None:
        """End the last step."""
        with self._lock:
            self._end()
            self._name = ""

    def _end(self) -> None:
        """Say how long a step took of which lines were written."""
        if self._written:
            self._say(f"done in {monotonic() - self._begun:.0f} s")

    def _say(self, text: str) -> None:
        try:
            print(f"{self._name}: {text}", file=self._stream, flush=True)
        except (OSError, ValueError):  # progress that nobody reads ends nothing
            self._name = ""


def _amount(value: int, total: int) -> str:
    return decimal(value) if total >= _BYTES_FROM else f"{value:,}"
