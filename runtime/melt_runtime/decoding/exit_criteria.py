"""The criteria by which tokens leave the loops early. Requests, packages and PyTorch's models share their names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..untrusted import shown

AUTO, NEVER = "auto", "never"
_MOST_TEXT = 256  # characters


@dataclass(frozen=True)
class Criterion:
    """One criterion.

    - ``option``: the field of ``LoopSettings`` that holds its value; ``never``: the value that ends no token.
    - ``reads``: what must be known after every loop: the exit "gate", which the loop gives anyway, the "hidden" state,
      which is read back, or the "head", which runs after every loop, and a coda before it.
    - ``first``: the first loop after which it can end a token: 2 if it compares loops.
    """

    option: str
    reads: str
    never: float = 0.0
    most: float = math.inf
    whole: bool = False
    first: int = 1

    def check(self, value: Any) -> None:
        """Raise ArgumentError for a value that cannot be."""
        kinds: Any = int if self.whole else float | int
        real = isinstance(value, kinds) and not isinstance(value, bool)
        if real and math.isfinite(value) and 0 <= value <= self.most:
            return
        kind = "a whole number from 0" if self.whole else "a finite number of at least 0"
        must = "lie between 0 and 1" if self.most == 1 else f"be {kind}"
        raise ArgumentError(f"{self.option} is {shown(value)}; it must {must}")


CRITERIA = {
    "gate": Criterion("exit_threshold", "gate", never=1.0, most=1.0),
    "change": Criterion("exit_change", "hidden", first=2),
    "kl": Criterion("exit_kl", "head", first=2),
    "entropy": Criterion("exit_entropy", "head"),
    "margin": Criterion("exit_margin", "head", most=1.0),
    "same": Criterion("exit_same", "head", whole=True, first=2),
}


def parse_exit(text: Any) -> dict[str, float]:
    """Read "NAME:VALUE" or several with commas, or "never". Returns the value of every criterion, by option.

    Raises ArgumentError.
    """
    found = {one.option: int(one.never) if one.whole else one.never for one in CRITERIA.values()}
    if not isinstance(text, str) or len(text) > _MOST_TEXT:
        raise ArgumentError(f"exit is {shown(text)}; it must be text such as 'entropy:0.3'")
    if text.strip() == NEVER:
        return found
    seen = set[str]()
    for part in text.split(","):
        name, colon, value = (piece.strip() for piece in part.partition(":"))
        if name in seen:
            raise ArgumentError(f"exit is {shown(text)}, which names {name} twice")
        if name not in CRITERIA or not colon:
            raise ArgumentError(
                f"exit is {shown(text)}; it must be {AUTO}, {NEVER} or NAME:VALUE with one of {', '.join(CRITERIA)}, "
                "several with commas"
            )
        seen.add(name)
        one = CRITERIA[name]
        try:
            found[one.option] = int(value) if one.whole else float(value)
        except ValueError as error:
            kind = "a whole number" if one.whole else "a number"
            raise ArgumentError(f"exit is {shown(text)}, where {shown(value)} is not {kind}") from error
        one.check(found[one.option])
    return found


def named_by_exit(text: str) -> set[str]:
    """Return the options that an ``exit``, which ``parse_exit`` has read, decides: all of them for "never"."""
    if text.strip() == NEVER:
        return {one.option for one in CRITERIA.values()}
    return {CRITERIA[part.partition(":")[0].strip()].option for part in text.split(",")}


def spelled_exit(options: Mapping[str, Any]) -> str:
    """Return the criteria as ``parse_exit`` reads them. ``options``: values by option."""
    used = [f"{name}:{options[one.option]:g}" for name, one in CRITERIA.items() if options[one.option] != one.never]
    return ",".join(used) or NEVER
