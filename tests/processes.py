"""Processes that tests start: Ctrl-C reaches them whatever started the tests, and each has a time limit."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Timer
from typing import Any

LIMIT = 300.0  # seconds, for what takes a few where nothing else computes


def let_ctrl_c_through() -> None:
    """Gives SIGINT back its usual meaning, here and in every process that is started from now on.

    Whoever starts the tests may ignore it, and a process that inherits this never hears a Ctrl-C: ``nohup``, a job in a
    script's background, some executors of CI.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def started(command: Sequence[Any], limit: float = LIMIT, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A running process, which is killed when the block ends or after ``limit`` seconds."""
    with subprocess.Popen([str(part) for part in command], **options) as process:
        timer = Timer(limit, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()
