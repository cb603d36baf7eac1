"""What ends a token's loops early: criteria that a request combines, and their state while a chunk's loops run.

| name | a token leaves once | reads |
|---|---|---|
| ``gate`` | the cumulative exit probability reaches the value (1: never) | the exit gate |
| ``change`` | a loop changed its hidden state by less than this share of its norm | the hidden state |
| ``kl`` | KL(p_t || p_{t-1}) of the head's words after successive loops is below the value, in nats | the head |
| ``entropy`` | the entropy of the head's words is below the value, in nats | the head |
| ``margin`` | the likeliest word leads the second by at least this probability | the head |
| ``same`` | the likeliest word has been the same in so many loops more | the head |

For all but ``gate``, 0 is never. What reads the head runs it, and a coda before it, after every loop, and applies to
tokens that run by themselves, as generated ones do. The runtime has the same criteria under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from .errors import shown
from .layers import leave_early


@dataclass(frozen=True)
class ExitCriteria:
    """When a token leaves the loops: as soon as one criterion is met. The module explains each. Raises ValueError."""

    gate: float = 1.0
    change: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    margin: float = 0.0
    same: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            most = 1.0 if name in ("gate", "margin") else math.inf
            kinds = int if name == "same" else int | float
            real = isinstance(value, kinds) and not isinstance(value, bool)
            if not real or not math.isfinite(value) or not 0 <= value <= most:
                must = "a whole number from 0" if name == "same" else "a number from 0 to 1" if most == 1 else "finite"
                raise ValueError(f"the exit criterion {name} is {shown(value)}; it must be {must}")

    @classmethod
    def parse(cls, text: str) -> ExitCriteria:
        """Read "NAME:VALUE", or several with commas, or "never". Raises ValueError."""
        if text.strip() == "never":
            return cls()
        known = {field.name for field in fields(cls)}
        found: dict[str, float] = {}
        for part in text.split(","):
            name, colon, value = (piece.strip() for piece in part.partition(":"))
            if name not in known or not colon or name in found:
                raise ValueError(
                    f"exit is {shown(text)}; it must be never, or NAME:VALUE with one of {', '.join(sorted(known))}, "
                    "several with commas"
                )
            try:
                found[name] = int(value) if name == "same" else float(value)
            except ValueError as error:
                raise ValueError(f"exit is {shown(text)}: {shown(value)} is no number") from error
        return cls(**found)  # type: ignore[arg-type]

    @property
    def adaptive(self) -> bool:
        """Whether a token may leave before its last loop."""
        return self.gate < 1 or self.change > 0 or self.hears_head

    @property
    def hears_head(self) -> bool:
        """Whether the head runs after every loop."""
        return any(value > 0 for value in (self.kl, self.entropy, self.margin, self.same))


class Exits:
    """Decides after each loop which tokens of a chunk leave. ``present``: (batch, chunk) bool, the tokens that run.

    ``logits``: gives the head's logits (batch, chunk, vocab) of a hidden state (batch, chunk, d); called only if a
    criterion reads the head and a sequence's token runs by itself.
    """

    def __init__(self, criteria: ExitCriteria, present: Tensor, logits: Callable[[Tensor], Tensor] | None = None):
        if criteria.hears_head and logits is None:
            raise ValueError("the exit criteria read the head, which was not given")
        self.criteria, self.logits = criteria, logits
        self._alone = (present.sum(1, keepdim=True) == 1) & present
        self._remaining = torch.ones_like(present, dtype=torch.float32)
        self._hidden: Tensor | None = None
        self._said: Tensor | None = None
        self._still = torch.zeros_like(present, dtype=torch.long)

    def leaves(self, hidden: Tensor, exit_probability: Tensor | None) -> Tensor:
        """Return the tokens (batch, chunk) bool that leave after a loop.

        ``hidden``: (batch, chunk, d), after the loop; ``exit_probability``: (batch, chunk), None without a gate.
        """
        wanted, leaves = self.criteria, torch.zeros_like(self._alone)
        if exit_probability is not None:
            self._remaining, leaves = leave_early(self._remaining, exit_probability, wanted.gate)
        if wanted.change > 0:
            before, self._hidden = self._hidden, hidden.float()
            if before is not None:
                moved = (self._hidden - before).norm(dim=-1)
                leaves = leaves | (moved < wanted.change * self._hidden.norm(dim=-1))
        if wanted.hears_head and bool(self._alone.any()):
            assert self.logits is not None
            leaves = leaves | (self._alone & self._settled(self.logits(hidden).double().log_softmax(-1)))
        return leaves

    def _settled(self, said: Tensor) -> Tensor:
        """Return for which tokens (batch, chunk) the head's log-probabilities (batch, chunk, vocab) end the loops."""
        wanted, settled = self.criteria, torch.zeros_like(self._alone)
        before, self._said = self._said, said
        if wanted.entropy > 0:
            settled |= torch.special.entr(said.exp()).sum(-1) < wanted.entropy
        if wanted.margin > 0 and said.shape[-1] > 1:
            first, second = said.exp().topk(2).values.unbind(-1)
            settled |= first - second >= wanted.margin
        if before is None:
            return settled
        if wanted.kl > 0:
            settled |= torch.nansum(said.exp() * (said - before), -1) < wanted.kl
        if wanted.same > 0:
            self._still = torch.where(said.argmax(-1) == before.argmax(-1), self._still + 1, 0)
            settled |= self._still >= wanted.same
        return settled
