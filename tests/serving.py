"""A server process on loopback, for the tests of the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any, Self

import httpx
from openai import OpenAI

WAIT = 60.0  # seconds; a hang limit


class Server:
    """A ``melt-run serve`` process on a free port, named "tiny". ``before``: lines of Python that it runs first."""

    def __init__(self, package: Path, *options: object, port: int = 0, before: str = "", **environment: str):
        program = f"{before}\nfrom melt_runtime.cli.main import main; main()"
        arguments = ["serve", package, "--name", "tiny", "--port", port, "--threads", 1, *options]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.lines: deque[str] = deque(maxlen=1000)
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._listening.wait(WAIT), "".join(self.lines)
        assert self.process.poll() is None, "".join(self.lines)
        self.url = str(next(line for line in self.log() if line["event"] == "listening")["url"])
        self.port = int(self.url.rpartition(":")[2])
        eventually(lambda: self.answers("/ready"))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if '"listening"' in line:
                self._listening.set()
        self._listening.set()

    def answers(self, path: str) -> bool:
        """Return whether a GET succeeds."""
        try:
            return httpx.get(self.url + path, timeout=WAIT, verify=False).status_code == 200
        except httpx.TransportError:
            return False

    def log(self) -> list[dict[str, Any]]:
        """Return the log lines so far."""
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]

    def client(self, key: str = "none") -> OpenAI:
        """Return OpenAI's own client, without retries."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT)

    def metrics(self) -> dict[str, float]:
        """Return the values of /metrics by name."""
        lines = httpx.get(f"{self.url}/metrics", timeout=WAIT).text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines) if name[0] != "#"}

    def end(self) -> int:
        """Wait for the process to end and return its exit code."""
        code = self.process.wait(WAIT)
        self._reader.join(WAIT)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.end()


def eventually(true: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    for _ in range(int(WAIT / 0.02)):
        if true():
            return
        sleep(0.02)
    raise AssertionError("it never came to be")
