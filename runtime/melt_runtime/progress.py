"""One progress display for everything that takes long: steps with names, one below the other, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Reports a step: its name, its size (0: unknown), and what was done since the last call.
Step = Callable[[str, int, int], None]


def no_progress(step: str, total: int, done: int) -> None:
    """For callers that do not watch."""


@contextmanager
def shown_progress() -> Iterator[Step]:
    """A progress display on stderr: the callable takes a step, its size, and what was done since its last call."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    display = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, Any] = {}

    def finish() -> None:
        for task in tasks.values():
            display.update(task, total=1, completed=1)
            display.stop_task(task)

    def step(name: str, total: int, done: int) -> None:
        if not tasks:
            display.start()  # not before: what is refused at once shows nothing but its reason
        if name not in tasks:
            finish()
            tasks[name] = display.add_task(name, total=total or None)
        display.advance(tasks[name], done)

    try:
        yield step
        finish()
    finally:
        if tasks:
            display.stop()
