"""Leave cores to other processes where that is faster than to compete for them.

ONNX Runtime's threads wait for each other after every operator. Beside a busy process one of them is often not running
when the others need it, and all wait until it has had its turn. A model of small operators is then faster with a thread
fewer, one of large operators is not, nor is a prompt.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread, get_ident
from typing import Any

import numpy as np

from ..package.specs import GraphSpec

_INTERVAL = 0.2  # seconds between two looks at the other processes
_AGAIN, _LONGEST = 10, 160  # looks after which both are tried again; doubled while the same one stays faster
_TURNS, _TURN = 12, 0.025  # a trial: so many turns, of so many seconds at least
_WORTH = 0.95  # of the time with fewer threads: what all must stay below to be worth other processes' cores
_STALE = 1.0  # seconds after which what was seen says nothing of now: what ran meanwhile may have ended
# The share of a core that must be free for a thread to stay, and for one to come back.
_STAYS, _COMES_BACK = 0.5, 0.75
_PATIENCE = 10.0  # seconds in which released threads must be back when their session ends


class OtherProcesses:
    """The cores that other processes use, among those that this process may run on.

    ``known``: whether the system reports it; Linux does. ``allowed``: how many cores this process may run on.
    """

    def __init__(self, stat: Path = Path("/proc/stat")):
        self._stat = stat
        affinity = getattr(os, "sched_getaffinity", None)
        self._names = {f"cpu{core}" for core in affinity(0)} if affinity else set()
        self.allowed = len(self._names)
        self._before = self._sample()
        self.known = self._before is not None

    def cores(self) -> float:
        """Return how many cores they used since the last call, or since this object was made; 0 if unknown."""
        before, now = self._before, self._sample()
        if before is None or now is None or now[0] <= before[0]:
            return 0.0
        self._before = now
        elapsed, worked, own = (late - early for late, early in zip(now, before, strict=True))
        return max(0.0, (worked - own) / elapsed)

    def _sample(self) -> tuple[float, float, float] | None:
        """Return seconds: of the clock, that the cores have worked, that this process has."""
        try:
            lines = self._stat.read_text(encoding="ascii").splitlines()
            rows = [line.split() for line in lines if line.partition(" ")[0] in self._names]
            # user, nice, system, idle, iowait, irq, softirq, steal; a guest's time is in user
            ticks = sum(int(value) for row in rows for value in row[1:4] + row[6:9])
            return (time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()) if rows else None
        except (OSError, ValueError):
            return None


class _Hold:
    """What one held thread waits for. ``thread``: its identifier once it waits, before that 0."""

    def __init__(self) -> None:
        self.gate, self.thread = Lock(), 0
        self.gate.acquire()

    @staticmethod
    def wait(_results: Any, hold: _Hold, _error: str) -> None:
        """Wait, as the callback of a run. Owns nothing of the session, which cannot end on a thread of its own."""
        hold.thread = get_ident()
        hold.gate.acquire()


class Workers:
    """The threads with which a session computes beside its caller's own, of which some can be held.

    A session's threads are fixed when it is made, and a second session would pack the weights a second time. But a
    callback of ``run_async`` runs on one of the threads, and while it waits there the others do that thread's share.
    """

    def __init__(self, session: Any, graph: GraphSpec):
        self._session, self._output = session, graph.outputs[0].name
        # Inputs that the graph refuses, or that hold nothing: the run is only there for its callback.
        self._nothing = {
            spec.name: np.zeros([0 if isinstance(dim, str) else 1 for dim in spec.shape], spec.dtype)
            for spec in graph.inputs
        }
        self._held: list[_Hold] = []
        self._released: list[_Hold] = []

    @property
    def held(self) -> int:
        """How many threads are held, or will be as soon as they have nothing else to do."""
        return len(self._held)

    def hold(self, count: int) -> None:
        """Hold ``count`` threads, no more and no fewer, without waiting for any of them."""
        while self.held < count:
            hold = _Hold()
            self._session.run_async([self._output], self._nothing, _Hold.wait, hold)
            self._held.append(hold)
        while self.held > count:
            hold = self._held.pop()
            hold.gate.release()
            self._released.append(hold)
        self.away()

    def away(self) -> set[int]:
        """Return the released threads that are not back in ONNX Runtime yet; 0 for those that never waited."""
        self._released = [hold for hold in self._released if not hold.thread or hold.thread in sys._current_frames()]
        return {hold.thread for hold in self._released}


class Choice:
    """All of ``most`` threads, or only as many as find a core free: whichever decodes faster.

    ``threads``: how many compute now. ``fitting``: how many found a core free at the last look. Both are tried in
    short turns, so that contexts and batches that change meanwhile change for both.
    """

    def __init__(self, most: int):
        self.most = self.threads = self.fitting = self._before = most
        self._again = _AGAIN
        self._means: dict[int, float] = {}  # by number of threads, the sum of its turns' seconds per loop step
        self._turns_left = self._looks = self._steps = 0
        self._seconds = 0.0

    @property
    def settled(self) -> bool:
        """Whether all threads run and no trial does."""
        return self.threads == self.most and not self._turns_left

    def update(self, fitting: int) -> None:
        """Begin a trial if ``fitting``, how many threads find a core free, changed or the last trial is long ago."""
        self._looks += 1
        if fitting == self.most:
            self.threads, self._turns_left = self.most, 0
        elif fitting != self.fitting or self._looks >= self._again:
            if fitting != self.fitting:
                self._again = _AGAIN
            self._before = self.threads
            self._means = {fitting: 0.0, self.most: 0.0}
            self.threads, self._turns_left, self._looks = fitting, _TURNS, 0
            self._seconds, self._steps = 0.0, 0
        self.fitting = fitting

    def ran(self, seconds: float) -> None:
        """Note what a loop step over one token of each sequence took."""
        if not self._turns_left:
            return
        self._seconds += seconds
        self._steps += 1
        if self._seconds < _TURN:
            return
        self._means[self.threads] += self._seconds / self._steps
        self._seconds, self._steps, self._turns_left = 0.0, 0, self._turns_left - 1
        if self._turns_left:
            self.threads = next(count for count in self._means if count != self.threads)
        else:
            self.threads = self.most if self._means[self.most] < _WORTH * self._means[self.fitting] else self.fitting
            self._again = min(2 * self._again, _LONGEST) if self.threads == self._before else _AGAIN


class ThreadLimit:
    """Holds threads of a package's sessions while other processes use their cores, where that is faster.

    ``owner``: the object that ends with the sessions, which cannot end while a thread of theirs is held. ``most``: the
    threads of each session. Until ``quiet_until`` (a ``perf_counter`` time) all threads run, and nothing needs to be
    called.
    """

    def __init__(self, owner: Any, most: int, sessions: Mapping[str, Any], graphs: Mapping[str, GraphSpec]):
        self.most = self._running = most
        self._choice, self._others = Choice(most), OtherProcesses()
        self._workers = [Workers(session, graphs[name]) for name, session in sessions.items()]
        self._lock = Lock()
        self._next = time.perf_counter() + _INTERVAL
        if self.most > 1 and self._others.known:
            weakref.finalize(owner, self._end)
        else:
            self._next = float("inf")
        self.quiet_until = self._next

    @property
    def threads(self) -> int:
        """How many threads decode now."""
        return self._choice.threads

    def before(self, width: int) -> None:
        """Prepare for a run over a chunk of so many tokens: a prompt's, wider than one, has all threads."""
        if time.perf_counter() >= self._next:
            self._look()
        threads = self._choice.threads if width == 1 else self.most
        if threads != self._running and self._lock.acquire(blocking=False):
            try:
                for workers in self._workers:
                    workers.hold(self.most - threads)
                self._running = threads
            except Exception:  # a build of ONNX Runtime that cannot: its threads compute as they do by themselves
                self._next, self._running, self._choice = float("inf"), self.most, Choice(self.most)
            finally:
                self._lock.release()
        settled = self._running == self.most and self._choice.settled
        self.quiet_until = self._next if settled else 0.0

    def decoded(self, seconds: float) -> None:
        """Note what a loop step over one token of each sequence took."""
        if self._lock.acquire(blocking=False):
            try:
                self._choice.ran(seconds)
            finally:
                self._lock.release()

    def _look(self) -> None:
        """Look at the other processes. What a late look sees says little of now."""
        late = time.perf_counter() - self._next
        if not self._lock.acquire(blocking=False):
            return
        try:
            free = self._others.allowed - self._others.cores()
            if late < _STALE:
                self._choice.update(fitting_threads(free, self._choice.fitting, self.most))
            self._next = time.perf_counter() + _INTERVAL
        finally:
            self._lock.release()

    def _end(self) -> None:
        """Release all threads and wait until they are back in ONNX Runtime.

        It joins them when a session ends, and holds the interpreter's lock meanwhile, which they need to return.
        """
        with self._lock:
            self._next, self._running, self._choice = float("inf"), self.most, Choice(self.most)
            for workers in self._workers:
                workers.hold(0)
        end = time.monotonic() + _PATIENCE
        while waiting := set[int]().union(*(workers.away() for workers in self._workers)):
            if get_ident() in waiting:  # the garbage collector ran on one of them
                Thread(target=self._end).start()
                return
            if time.monotonic() > end:
                return
            with suppress(KeyboardInterrupt):  # a thread that is not back when its session ends aborts the process
                time.sleep(0.001)


def fitting_threads(free: float, now: int, most: int) -> int:
    """Return how many threads, from 1 to ``most``, find a core where ``free`` are and ``now`` did so far.

    A thread loses its core when others use half of it, and has it back when they use a quarter.
    """
    stay, come_back = int(free + 1 - _STAYS), int(free + 1 - _COMES_BACK)
    return max(1, min(most, stay if stay < now else max(now, come_back)))
