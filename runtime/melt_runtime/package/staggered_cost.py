"""What staggered decoding of a package costs, as the exporter measures it and parity.json says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..untrusted import number, printable, record, whole

_MOST_KL = 1e6  # nats


@dataclass(frozen=True)
class StaggeredCost:
    """Staggered decoding against plain decoding by the same package, over ``positions`` given tokens of ``text``.

    - ``lanes``: tokens in flight.
    - ``kl``: mean KL(plain || staggered) of the next token's distribution, in nats.
    - ``top1``: share (0 to 1) of positions with the same best token.
    - ``chunk_kl``, ``chunk_top1``: the same of prefill in chunks of ``chunk`` tokens.
    - ``right``, ``plain_right``: shares (0 to 1) of ``problems`` that staggered and plain decoding answer exactly.
    """

    lanes: int
    text: str
    positions: int
    kl: float
    top1: float
    chunk: int
    chunk_kl: float
    chunk_top1: float
    problems: int = 0
    right: float = 0.0
    plain_right: float = 0.0

    def summary(self) -> str:
        """Describe the cost in one line."""
        answers = f"; {self.right:.1%} of {self.problems:,} answers right, plainly {self.plain_right:.1%}"
        return (
            f"KL {self.kl:.1e}, top-1 {self.top1:.1%} with {self.lanes} tokens in flight; "
            f"KL {self.chunk_kl:.1e}, top-1 {self.chunk_top1:.1%} in chunks of {self.chunk} "
            f"(against plain decoding, on {self.positions:,} positions of {self.text})"
        ) + (answers if self.problems else "")


def _name(value: Any, where: str) -> str:
    return printable(str(value))[:256]


_KL = number(-1, _MOST_KL)  # a mean may fall below 0 by rounding
_SHARE = number(0, 1)
STAGGERED_COST = record(
    StaggeredCost,
    {
        "lanes": whole(),
        "text": _name,
        "positions": whole(),
        "kl": _KL,
        "top1": _SHARE,
        "chunk": whole(),
        "chunk_kl": _KL,
        "chunk_top1": _SHARE,
        "problems": whole(0),
        "right": _SHARE,
        "plain_right": _SHARE,
    },
    {"problems": 0, "right": 0.0, "plain_right": 0.0},
)
