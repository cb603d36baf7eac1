"""``melt-run demo``: the package that every install brings answers additions at each depth."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ArgumentError
from ..results import Generation
from ..runtime import Runtime

# The first of the problems that the model was never trained on; `examples/addition_problems.jsonl` has all.
PROBLEMS = ("5024440+4965349", "2826595+7172401", "6937140+2284429", "6540176+0142463", "2060154+2569848")
DIGITS = 7  # of each number and of the sum
_MOST = 100  # problems of one call


def demo_package() -> Path:
    """Return the directory of the package that comes with the installation."""
    return Path(str(files("melt_runtime"))) / "demo_package"


def demo_command(
    problems: Annotated[
        list[str] | None, typer.Argument(metavar="[A+B]...", help="Additions, such as 4829173+3917458.")
    ] = None,
    where: Annotated[
        bool, typer.Option("--where", help="Print the directory of the package, for other commands, and end.")
    ] = False,
) -> None:
    """Answer additions with 1 to 4 loops, and with as many as each token needs, by a package of 0.3 MB that is
    installed with this command."""
    package = demo_package()
    if where:
        print(package)
        return
    asked = [_parsed(one) for one in problems or PROBLEMS]
    if len(asked) > _MOST:
        raise ArgumentError(f"the demo answers {_MOST} additions at a time; {len(asked)} were given")
    runtime = Runtime.load(package, threads=1)
    loops = range(1, runtime.manifest.loops + 1)
    prompts = [f"{a:0{DIGITS}}+{b:0{DIGITS}}=" for a, b in asked]
    depths: dict[str, Any] = {("1 loop" if depth == 1 else f"{depth} loops"): {"loops": depth} for depth in loops}
    depths["as deep as needed"] = {"exit": "auto"}
    columns = {title: _answers(runtime, prompts, depth) for title, depth in depths.items()}
    table = Table("problem", *columns)
    for index, (a, b) in enumerate(asked):
        told = (column[index].text for column in columns.values())
        table.add_row(f"{a}+{b}", *(f"{text} {'✓' if text == f'{a + b:0{DIGITS}}' else '✗'}" for text in told))
    deep = [depth for answer in columns["as deep as needed"] for depth in answer.depth[answer.prompt_tokens :]]
    table.add_row("", *("" for _ in loops), f"{sum(deep) / len(deep):.2f} loops per token")
    Console(width=None if sys.stdout.isatty() else 100, highlight=False, markup=False).print(table)
    print(f"The same weights and {runtime.state_bytes():,} bytes of state at every depth: looping is thinking longer.")
    print('Next: melt-run generate "$(melt-run demo --where)" 4829173+3917458= --loops 4')


def _answers(runtime: Runtime, prompts: Sequence[str], depth: Mapping[str, Any]) -> list[Generation]:
    """Answer all prompts, as many at a time as the package takes."""
    most, options = runtime.manifest.max_batch, {"max_tokens": DIGITS + 1, **depth}
    parts = (prompts[first : first + most] for first in range(0, len(prompts), most))
    return [answer for part in parts for answer in runtime.generate(part, **options)]


def _parsed(problem: str) -> tuple[int, int]:
    """Return the two numbers of an addition that the model can do. Raises ArgumentError."""
    found = re.fullmatch(r"\s*([0-9]{1,7})\s*\+\s*([0-9]{1,7})\s*=?\s*", problem)
    if found is None:
        raise ArgumentError(
            f"{problem[:60]!r} is no addition of whole numbers of up to {DIGITS} digits, such as 4829173+3917458"
        )
    a, b = int(found[1]), int(found[2])
    if a + b >= 10**DIGITS:
        raise ArgumentError(f"{a} + {b} has more than the {DIGITS} digits that the demo's model was trained on")
    return a, b
