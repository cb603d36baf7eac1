"""Chooses between plain and pipelined decoding by what both take here: drafts, rows and machines differ."""

from __future__ import annotations

from threading import Lock

_TRIAL = 16  # tokens of a trial
_AGAIN = 256  # tokens until the slower way is tried again; doubled each time that it is slower by far
_LONGEST = 8192
_BY_FAR = 1.15
_NEWEST = 0.5  # weight of a new trial's mean


class _Count:
    """What is known of one number of sequences. ``pipelined``: how their next tokens are decoded."""

    def __init__(self) -> None:
        self.pipelined, self._trial = False, True
        self._seconds: dict[bool, float] = {}  # per token, pipelined and not
        self._left, self._again = _TRIAL, _AGAIN  # tokens until the next decision, and from one trial to the next
        self._taken, self._tokens = 0.0, 0

    def ran(self, seconds: float, tokens: int) -> None:
        self._taken, self._tokens, self._left = self._taken + seconds, self._tokens + tokens, self._left - tokens
        if self._left > 0:
            return
        mean = self._taken / self._tokens
        before = self._seconds.get(self.pipelined, mean)
        self._seconds[self.pipelined] = before + _NEWEST * (mean - before)
        self._taken, self._tokens = 0.0, 0
        if not self._trial or len(self._seconds) == 1:
            self.pipelined, self._trial, self._left = not self.pipelined, True, _TRIAL
            return
        self.pipelined = self._seconds[True] < self._seconds[False]
        far = self._seconds[not self.pipelined] > _BY_FAR * self._seconds[self.pipelined]
        self._again = min(2 * self._again, _LONGEST) if far else _AGAIN
        self._trial, self._left = False, self._again


class PipelineChoice:
    """For each number of sequences, the faster way to decode them so far. Thread-safe.

    Both ways give the same tokens, so that the choice may change from token to token. Each is tried for a few tokens;
    the slower one is tried again now and then, more and more rarely while it stays slower by far.
    """

    def __init__(self) -> None:
        self._counts: dict[int, _Count] = {}
        self._lock = Lock()

    def pipelined(self, count: int) -> bool:
        """Return whether the next tokens of ``count`` sequences should be decoded pipelined."""
        with self._lock:
            return self._counts.setdefault(count, _Count()).pipelined

    def ran(self, count: int, pipelined: bool, seconds: float, tokens: int) -> None:
        """Note how long ``tokens`` tokens of ``count`` sequences took."""
        with self._lock:
            one = self._counts.setdefault(count, _Count())
            if one.pipelined == pipelined:
                one.ran(seconds, tokens)
