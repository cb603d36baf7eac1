"""Progress display on standard error: one line per named step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# A step's name, its total (0: unknown), and the amount done since the last call.
Step = Callable[[str, int, int], None]


def no_progress(step: str, total: int, done: int) -> None:
    """Ignore progress."""


@contextmanager
def shown_progress() -> Iterator[Step]:
    """Show progress on standard error, through a callable of step name, total, and the amount done since its last
    call."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    display = Progress(*columns, console=Console(stderr=True))
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

    try:
        yield step
        finish()
    finally:
        if tasks:
            display.stop()
