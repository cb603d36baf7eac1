"""Processes started by tests. Ctrl-C always reaches them, and each has a time limit."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Timer
from typing import Any

LIMIT = 300.0  # seconds; a hang limit for commands that take a few on a quiet machine


def let_ctrl_c_through() -> None:
    """Restore SIGINT's default handler, here and in every process that is started later.

    The tests' parent may ignore SIGINT (``nohup``, a script's background job, some executors of CI), and a process that
    inherits this never receives a Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def started(command: Sequence[Any], limit: float = LIMIT, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a process and kill it when the block ends, or after ``limit`` seconds."""
    with subprocess.Popen([str(part) for part in command], **options) as process:
        timer = Timer(limit, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()
