"""Chooses between plain and pipelined decoding by what both take here: drafts, rows and machines differ."""

from __future__ import annotations

from threading import Lock

_TRIAL = 16  # tokens of a trial
_AGAIN, _LONGEST = 256, 8192  # least and most tokens until the slower way is tried again
_COST = 0.01  # the share of the time that trials of the slower way may add
_NEWEST = 0.5  # weight of a new trial's mean


class _Count:
    """What is known of one number of sequences. ``pipelined``: how their next tokens are decoded."""

    def __init__(self) -> None:
        self.pipelined, self._trial = False, True
        self._seconds: dict[bool, float] = {}  # per token, pipelined and not
        self._left = _TRIAL  # tokens until the next decision
        self._taken, self._tokens = 0.0, 0

    def ran(self, seconds: float, tokens: int) -> None:
        self._taken, self._tokens, self._left = self._taken + seconds, self._tokens + tokens, self._left - tokens
        if self._left <= 0:
            self._decide(self._taken / self._tokens)

    def _decide(self, mean: float) -> None:
        """Choose how the next tokens are decoded. ``mean``: seconds per token of those before."""
        before = self._seconds.get(self.pipelined, mean)
        self._seconds[self.pipelined] = before + _NEWEST * (mean - before)
        self._taken, self._tokens = 0.0, 0
        if not self._trial or len(self._seconds) == 1:
            self.pipelined, self._trial, self._left = not self.pipelined, True, _TRIAL
            return
        self.pipelined = self._seconds[True] < self._seconds[False]
        lost = self._seconds[not self.pipelined] / self._seconds[self.pipelined] - 1  # by a trial, per token
        self._trial, self._left = False, round(min(max(_TRIAL * lost / _COST, _AGAIN), _LONGEST))


class PipelineChoice:
    """For each number of sequences, the faster way to decode them so far. Thread-safe.

    Both ways give the same tokens, so that the choice may change from token to token. Each is tried for a few tokens.
    The slower one is tried again now and then, the more rarely the slower it is.
    """

    def __init__(self) -> None:
        self._counts: dict[int, _Count] = {}
        self._lock = Lock()

    def pipelined(self, count: int) -> bool:
        """Return whether the next tokens of ``count`` sequences should be decoded pipelined."""
        one = self._counts.get(count)
        return one is not None and one.pipelined

    def ran(self, count: int, pipelined: bool, seconds: float, tokens: int) -> None:
        """Note how long ``tokens`` tokens of ``count`` sequences took."""
        with self._lock:
            one = self._counts.get(count)
            if one is None:
                one = self._counts[count] = _Count()
            if one.pipelined == pipelined:
                one.ran(seconds, tokens)
