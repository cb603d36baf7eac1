"""Sends inputs to workers, counts the results, and keeps every finding."""

from __future__ import annotations

import base64
import json
import math
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings

from .targets import TARGETS

SECONDS = 20  # of processor time per input
WAIT = 300.0  # seconds per input, however busy the machine
GROWTH = 512 << 20  # most bytes of memory that one input may take
FINE = ("accepted", "refused")
_START_SECONDS = 120


@dataclass(frozen=True)
class Finding:
    """An input that was neither accepted nor properly refused."""

    target: str
    what: str
    details: str
    content: bytes


class Worker:
    """A worker process of a target, restarted when it dies or hangs. A context manager."""

    def __init__(self, target: str, package: Path):
        self.target, self.package = target, package
        self.seeds: list[bytes] = []
        self._work = tempfile.TemporaryDirectory(prefix="melt-fuzz-")
        self._started = 0
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._work.cleanup()

    def attempt(self, content: bytes) -> Finding | str:
        """Try an input. Returns "accepted", "refused", or a finding."""
        assert self._process.stdin is not None
        answer: dict[str, Any] | None = None
        try:
            self._process.stdin.write(struct.pack("<I", len(content)) + content)
            self._process.stdin.flush()
            answer = self._answer(WAIT, SECONDS)
        except BrokenPipeError:
            pass
        if answer is None:
            ended = self._process.poll()
            if ended is None:
                try:
                    ended = self._process.wait(1)
                except subprocess.TimeoutExpired:
                    ended = None
            what = "hang" if ended is None else "signal" if ended < 0 else "exit"
            details = (
                f"no answer within {SECONDS} s of processor time or {WAIT:g} s"
                if ended is None
                else f"the worker ended with {ended}"
            )
            self._stop()
            self._start()
            return Finding(self.target, what, details, content)
        if answer["outcome"] not in FINE:
            return Finding(self.target, answer["outcome"], answer["error"], content)
        if answer["grown"] > GROWTH:
            return Finding(self.target, "over-allocation", f"{answer['grown']:,} bytes", content)
        if "panicked" in answer["spoke"]:
            return Finding(self.target, "panic", answer["spoke"], content)
        return str(answer["outcome"])

    def _start(self) -> None:
        self._started += 1
        work = Path(self._work.name) / str(self._started)
        work.mkdir()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "fuzz.worker", self.target, str(self.package), str(work)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=work
        )
        seeds = self._answer(_START_SECONDS)
        if seeds is None:
            self._stop()
            said = (work / "stderr").read_text(errors="replace") if (work / "stderr").is_file() else ""
            raise RuntimeError(f"the worker for {self.target} does not start: {said[-2000:]}")
        self.seeds = [base64.b64decode(one) for one in seeds]

    def _answer(self, seconds: float, processor: float = math.inf) -> Any:
        """Return the next line; None if none comes within so many seconds or so much processor time of the worker, or
        the process has ended."""
        assert self._process.stdout is not None
        end, spent = time.monotonic() + seconds, self._processor_seconds()
        while not select.select([self._process.stdout], [], [], 1.0)[0]:
            if time.monotonic() > end or self._processor_seconds() - spent > processor:
                return None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def _processor_seconds(self) -> float:
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


@dataclass
class Tally:
    """Results of all inputs of a target."""

    target: str
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        return sum(self.outcomes.values())

    def line(self) -> str:
        """Format the results for people."""
        bad = {name: count for name, count in self.outcomes.items() if name not in FINE}
        rest = ", ".join(f"{count} {name}" for name, count in sorted(bad.items())) or "nothing else"
        accepted, refused = self.outcomes["accepted"], self.outcomes["refused"]
        return f"{self.target}: {self.tried} tried, {accepted} accepted, {refused} refused, {rest}"


def hunt(worker: Worker, tally: Tally, examples: int, start: int) -> None:
    """Try as many inputs as ``examples``, chosen by ``start``. Keeps the smallest finding of each kind."""

    @seed(start)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(content=TARGETS[worker.target].mutate(worker.seeds))  # type: ignore[attr-defined]
    def one(content: bytes) -> None:
        found = worker.attempt(content)
        if isinstance(found, str):
            tally.outcomes[found] += 1
            return
        tally.outcomes[found.what] += 1
        # Continue after a finding: the next one may be of another kind.
        kind = f"{found.what}: {found.details.strip().splitlines()[-1][:200] if found.details.strip() else ''}"
        known = tally.findings.get(kind)
        if known is None or len(found.content) < len(known.content):
            tally.findings[kind] = found

    one()
