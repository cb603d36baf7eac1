"""A builder's progress as one bar per graph, and a clean stop on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..progress import Step
from .library import Library

_PARTS = 1000  # the bar's length
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Phases:
    """The progress of nested phases as a fraction: a phase counts its finished steps and the progress of its running
    step."""

    def __init__(self) -> None:
        self.open: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, steps done
        self.reached = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase."""
        self.open[name] = (parent, max(steps, 1), 0)

    def step(self, name: str, step: int) -> None:
        """Finish a phase's step, counted from 0."""
        if name in self.open:
            parent, steps, _ = self.open[name]
            self.open[name] = (parent, steps, min(step + 1, steps))
            self._move(name)

    def finish(self, name: str) -> None:
        """End a phase."""
        self.open.pop(name, None)

    def _move(self, name: str) -> None:
        part, current = 0.0, name
        for _ in range(len(self.open)):  # a name may return, but not inside itself
            parent, steps, done = self.open[current]
            part = min((done + part) / steps, 1.0)
            if parent is None or parent not in self.open:
                break
            current = parent
        self.reached = max(self.reached, part)


@contextmanager
def signals_deferred(monitor: Any) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP wait until the builder stops at its next step, because raising in its callbacks
    crashes it.

    Only the main thread receives signals; elsewhere this does nothing.
    """
    caught: list[tuple[int, Any]] = []
    previous: dict[int, Callable[[int, Any], Any]] = {}

    def note(number: int, frame: Any) -> None:
        caught.append((number, frame))
        monitor.stopped = True

    if threading.current_thread() is threading.main_thread():
        for number in _ENDING:
            handler = signal.getsignal(number)
            if callable(handler):
                previous[number] = handler
                signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number, frame in caught[:1]:
            previous[number](number, frame)


def make_monitor(library: Library, title: str, progress: Step) -> Any:
    """Make an IProgressMonitor that reports to ``progress``; ``interrupted`` holds the exception that stopped the
    build."""
    base = library.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.phases, self.shown = Phases(), 0
            self.stopped = False
            self.interrupted: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            # An exception must not cross the library's code: keep it, stop the build, and let the caller raise it.
            try:
                self.phases.step(phase_name, step)
                parts = int(self.phases.reached * _PARTS)
                progress(title, _PARTS, parts - self.shown)
                self.shown = parts
            except BaseException as error:
                self.interrupted = error
            return self.interrupted is None and not self.stopped

        def complete(self) -> None:
            progress(title, _PARTS, _PARTS - self.shown)

    return Monitor()
