"""Demo: an exported addition model answers held-out problems with 1, 2, 3 and 4 loops, and with as many as each token
needs, without PyTorch.

python examples/demo.py PACKAGE
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import fmean
from typing import Annotated, NamedTuple

import typer
from melt_runtime import Generation, Runtime
from rich.console import Console
from rich.progress import track
from rich.table import Table

SHOWN = 6
EXIT_THRESHOLD = 0.99
UNCALIBRATED = "entropy:0.3"  # where the package was exported without --exit
PROBLEMS = Path(__file__).with_name("addition_problems.jsonl")


class Problem(NamedTuple):
    """``prompt`` is read by the model; ``answer`` must be written before the end token."""

    prompt: str
    answer: str


def held_out_problems() -> list[Problem]:
    """Read additions with long carries that were never trained on (see the checkpoint's model card)."""
    return [Problem(**json.loads(line)) for line in PROBLEMS.read_text(encoding="utf-8").splitlines()]


def answers(runtime: Runtime, problems: list[Problem], loops: int, exit_threshold: float = 1.0) -> list[Generation]:
    """Generate an answer to each problem, greedily."""
    prompts = [problem.prompt for problem in problems]
    return runtime.generate(prompts, max_tokens=12, loops=loops, exit_threshold=exit_threshold)


def adaptive_answers(runtime: Runtime, problems: list[Problem], criteria: str) -> list[Generation]:
    """Generate an answer to each problem, each token with as many loops as the criteria give it."""
    return runtime.generate([problem.prompt for problem in problems], max_tokens=12, exit=criteria)


def answers_behind(runtime: Runtime, problems: list[Problem], loops: int) -> list[Generation]:
    """Generate an answer to each problem with ``loops`` loops per token, after a prompt that runs all loops."""
    found = []
    for problem in problems:
        session = runtime.session()
        session.append(problem.prompt, exit="never")
        found.append(session.generate(max_tokens=12, loops=loops, exit="never"))
    return found


def mixed_accuracy(runtime: Runtime, problems: list[Problem], loops: float) -> float:
    """Return the accuracy, 0 to 1, of fixed depths at this mean: a share of the problems at the depth below it, the
    others at the depth above."""
    low, high = math.floor(loops), math.ceil(loops)
    below, above = (accuracy(problems, answers_behind(runtime, problems, depth)) for depth in (low, high))
    return below + (above - below) * (loops - low)


def accuracy(problems: list[Problem], generations: list[Generation]) -> float:
    """Return the share of exact answers, 0 to 1."""
    return sum(g.text == problem.answer for problem, g in zip(problems, generations, strict=True)) / len(problems)


def mean_depth(generations: list[Generation]) -> float:
    """Return the mean loops per written token."""
    return fmean(depth for g in generations for depth in g.depth[g.prompt_tokens :])


def prompt_depth(generations: list[Generation]) -> float:
    """Return the mean loops per token of the prompts."""
    return fmean(depth for g in generations for depth in g.depth[: g.prompt_tokens])


def main(
    package: Annotated[Path, typer.Argument(help="A package of examples/addition-melt.")],
    count: Annotated[int, typer.Option(help="Number of held-out problems.", min=1, max=200)] = 200,
) -> None:
    """Show some answers, then the accuracy against the number of loops and with early exit."""
    console = Console(soft_wrap=True)
    runtime = Runtime.load(package)
    problems = held_out_problems()[:count]
    rows = {f"{loops} loop{'s' * (loops > 1)}": (loops, 1.0) for loops in range(1, runtime.manifest.loops + 1)}
    most = runtime.manifest.loops
    rows[f"gate, exit at {EXIT_THRESHOLD}"] = (most, EXIT_THRESHOLD)

    found: dict[str, list[Generation]] = {}
    for name, (loops, threshold) in track(rows.items(), "answering", console=Console(stderr=True)):
        found[name] = answers(runtime, problems, loops, threshold)

    shown = Table("problem (never seen in training)", *list(found)[:-1], title="The same weights, thinking longer")
    for index, problem in enumerate(problems[:SHOWN]):
        cells = [found[name][index].text for name in list(found)[:-1]]
        marked = [f"[green]{c}[/]" if c == problem.answer else f"[red]{c} ✗[/]" for c in cells]
        shown.add_row(problem.prompt.rstrip("="), *marked)
    console.print(shown)

    calibrated = runtime.manifest.exit
    criteria = str(calibrated.get("criteria", UNCALIBRATED))
    found[criteria] = adaptive = adaptive_answers(runtime, problems, "auto" if calibrated else UNCALIBRATED)
    title = f"{count} held-out problems with long carries"
    table = Table("depth", "right", "loops per written token", "per prompt token", title=title)
    for name, generations in found.items():
        depths = f"{mean_depth(generations):.2f}", f"{prompt_depth(generations):.2f}"
        table.add_row(name, f"{accuracy(problems, generations):.1%}", *depths)
    mean = mean_depth(adaptive)
    fixed = mixed_accuracy(runtime, problems, mean)
    table.add_row("fixed depths, as many", f"{fixed:.1%}", f"{mean:.2f}", f"{most:.2f}")
    console.print(table)
    console.print("The last line is the mixture of the two nearest fixed depths, behind prompts that run all loops.")
    console.print(f"state: {runtime.state_bytes():,} bytes for one sequence, whatever the number of loops")
    if "torch" in sys.modules:
        raise SystemExit("torch was imported; the runtime must not need it")


if __name__ == "__main__":
    typer.run(main)
