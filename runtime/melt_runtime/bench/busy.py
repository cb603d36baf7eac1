"""Processes that keep cores busy beside a measurement."""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType
from typing import Self

from ..errors import ArgumentError, BackendError

MOST = 64
# Ends when its standard input does, which the system closes however the process that started it ends.
_PROGRAM = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.SIG_IGN)
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
print("running", flush=True)
while True:
    pass
"""


def check_count(count: int) -> None:
    """Check a number of busy processes. Raises ArgumentError below 0 and above 64."""
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST:
        raise ArgumentError(f"busy is {count!r}; it must be a number of processes from 0 to {MOST}")


class BusyProcesses:
    """``count`` processes, each of which keeps a core busy from ``with`` to the end of its block::

        with BusyProcesses(1):
            measure()

    They run at the priority of this process and end with it, also if it is killed. Raises ArgumentError as
    ``check_count`` does, BackendError if one cannot be started.
    """

    def __init__(self, count: int):
        check_count(count)
        self.count, self.processes = count, list[subprocess.Popen[bytes]]()

    def __enter__(self) -> Self:
        try:
            for _ in range(self.count):
                self.processes.append(self._start())
            for process in self.processes:
                if not process.stdout or not process.stdout.readline():
                    raise BackendError(f"a busy process could not be started with {sys.executable}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
        try:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise BackendError(f"a busy process could not be started with {sys.executable}: {error}") from error

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()
        self.processes.clear()
