"""Measures early exit: quality against mean loops, for every criterion beside fixed depths, and writes docs/exits.json.

    python benchmarks/experiments/exits.py addition ROW=CHECKPOINT[,CHECKPOINT...] ...
    python benchmarks/experiments/exits.py text ROW=CHECKPOINT[,...] --held-out FILE ... --capped [--device cuda]
    python benchmarks/experiments/exits.py letters ROW=CHECKPOINT[,...] --held-out FILE --prompt 16 --written 48

A row is a way of training; its checkpoints are seeds. Of a row that ends in -gate only the gate is measured: the other
criteria are those of the row without. Results are merged into the file, row by row. Afterwards
exit_docs.py writes docs/adaptive-depth.md. Minutes on one core for addition.

Prompts run all loops, for fixed depths and for every criterion, so that only the written tokens differ; "prompt too"
are the fixed depths that the prompt shares. With ``--capped`` a criterion is also tried with fewer loops at most, as
``--loops 2 --exit gate:0.8`` asks for: a word that no depth makes sure of would run them all.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from melt_models.atomic import write_text
from melt_models.checkpoint import load_model
from melt_models.exits import ExitCriteria
from melt_models.training.tasks import END, Example, make_task
from shared import machine, versions
from text_measure import held_out_sequences
from torch import Tensor

PROBLEMS = 500
SEQUENCES = 12  # per held-out file
GRID: dict[str, tuple[float, ...]] = {
    "gate": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999, 0.99999),
    "entropy": (3.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.005),
    "margin": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995, 0.999, 0.9999),
    "kl": (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001),
    "change": (1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
    "same": (1, 2),
}
Figures = dict[str, Any]
# Quality and mean loops per written token, of tokens that run at most so many loops and leave by these criteria.
# ``shared``: whether the prompt has the same depth.
Measure = Callable[[int, ExitCriteria, bool], Figures]


def head_share(model: Any) -> float:
    """Return the weights of the head as a share of those of a loop: what reading it once more costs."""
    loop = sum(weight.numel() for weight in model.model.layers.parameters())
    return float(model.lm_head.weight.numel() / loop)


def of_addition(model: Any, count: int) -> Measure:
    """Measure exact answers: ``quality`` is the share, 0 to 1, over problems drawn evenly and with long carries."""
    task = make_task(task="addition", digits=7)
    ids = {token: index for index, token in enumerate(task.vocabulary)}
    kinds = {"even": task.test_set(count), "long": task.test_set(count, hard=True)}

    def measure(loops: int, criteria: ExitCriteria, shared: bool) -> Figures:
        found = {kind: _answers(model, examples, ids, loops, criteria, shared) for kind, examples in kinds.items()}
        shares = {kind: right for kind, (right, _) in found.items()}
        mean = sum(shares.values()) / len(shares)
        depth = sum(depth for _, depth in found.values()) / len(found)
        return {
            "quality": round(mean, 5),
            "loops": round(depth, 4),
            **{kind: round(x, 5) for kind, x in shares.items()},
        }

    return measure


@torch.no_grad()
def _answers(
    model: Any, examples: list[Example], ids: dict[str, int], loops: int, criteria: ExitCriteria, shared: bool
) -> tuple[float, float]:
    """Return the share of exact answers, and the mean loops per token that is run to write them."""
    prompts = torch.tensor([[ids[c] for c in x.prompt] for x in examples], device=model.device)
    answers = torch.tensor([[*(ids[c] for c in x.answer), ids[END]] for x in examples], device=model.device)
    most = loops if shared else model.config.total_ut_steps
    output = model(prompts, num_loops=most, exit_threshold=1.0, logits_to_keep=1)
    tokens, depths = [output.logits[:, -1].argmax(-1)], []
    for _ in range(answers.shape[1] - 1):
        cache = output.past_key_values
        output = model(tokens[-1][:, None], past_key_values=cache, num_loops=loops, exit_threshold=1.0, exits=criteria)
        tokens.append(output.logits[:, -1].argmax(-1))
        depths.append(output.depth[:, 0].double())
    right = (torch.stack(tokens, 1) == answers).all(1).double().mean()
    return float(right), float(torch.stack(depths).mean())


def of_text(model: Any, sequences: Tensor, prompt: int) -> Measure:
    """Measure the loss of text that is read token by token behind a prompt: ``quality`` is the loss, negated.

    sequences: (n, tokens), of which ``prompt`` run at once, and the last is not run.
    """
    ids = sequences.to(model.device)
    prompts: dict[int, Any] = {}  # the cache behind the prompts, by its loops

    @torch.no_grad()
    def measure(loops: int, criteria: ExitCriteria, shared: bool) -> Figures:
        most = loops if shared else model.config.total_ut_steps
        if most not in prompts:
            read = model(ids[:, :prompt], num_loops=most, exit_threshold=1.0, logits_to_keep=1)
            prompts[most] = read.past_key_values
        cache, loss, depth = copy.deepcopy(prompts[most]), 0.0, 0.0
        for at in range(prompt, ids.shape[1] - 1):
            output = model(
                ids[:, at : at + 1], past_key_values=cache, num_loops=loops, exit_threshold=1.0, exits=criteria
            )
            loss += float(F.cross_entropy(output.logits[:, -1].double(), ids[:, at + 1]))
            depth += float(output.depth.double().mean())
        written = ids.shape[1] - 1 - prompt
        loss, depth = loss / written, depth / written
        return {"quality": round(-loss, 6), "loops": round(depth, 4), "perplexity": round(math.exp(loss), 4)}

    return measure


def curves(model: Any, measure: Measure, criteria: Sequence[str] = tuple(GRID), *, capped: bool = False) -> Figures:
    """Return the fixed depths and the curves of criteria. ``cost``: loops, and what further heads cost.

    ``capped``: also with fewer loops at most, from 2 on; the points then say with how many.
    """
    most, share = model.config.total_ut_steps, head_share(model)
    found: Figures = {"loops": most, "head_share": round(share, 4)}
    for name, shared in (("fixed", False), ("fixed, prompt too", True)):
        found[name] = [{**measure(loops, ExitCriteria(), shared), "setting": loops} for loops in range(1, most + 1)]
        for point in found[name]:
            point["cost"] = point["loops"]
    found["criteria"] = {}
    for name in criteria:
        points = []
        for cap, value in product(range(2, most + 1) if capped else (most,), GRID[name]):
            setting: Figures = {name: value}
            point = {**measure(cap, ExitCriteria(**setting), False), "setting": value, "most": cap}
            heads = 0.0 if name in ("gate", "change") else share * min(point["loops"], cap - 1)
            points.append(point | {"cost": round(point["loops"] + heads, 4)})
        found["criteria"][name] = points
    return found


def main(
    task: Annotated[str, typer.Argument(help="addition, text or letters.")],
    rows: Annotated[list[str], typer.Argument(help="ROW=CHECKPOINT[,CHECKPOINT...], seed by seed.")],
    held_out: Annotated[list[str] | None, typer.Option(help="Token files (uint16) of held-out text.")] = None,
    device: Annotated[str, typer.Option(help="What PyTorch computes on.")] = "cpu",
    problems: Annotated[int, typer.Option(help="Problems of each kind.")] = PROBLEMS,
    prompt: Annotated[int, typer.Option(help="Tokens of a text that run at once.")] = 96,
    written: Annotated[int, typer.Option(help="Tokens of a text that run one by one behind them.")] = 32,
    sequences: Annotated[int, typer.Option(help="Sequences per held-out file.")] = SEQUENCES,
    capped: Annotated[bool, typer.Option("--capped", help="Also with 2, 3, ... loops at most.")] = False,
    output: Annotated[Path, typer.Option(help="The file to merge the results into.")] = Path("docs/exits.json"),
) -> None:
    """Measure early exit of trained checkpoints."""
    if task not in ("addition", "text", "letters") or (task != "addition" and not held_out):
        raise typer.BadParameter("the task is addition, or text or letters with --held-out")
    torch.set_num_threads(1)
    content: Figures = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"tasks": {}}
    for row in rows:
        name, _, places = row.partition("=")
        found, begun = [], time.monotonic()
        sample = f"{problems} held-out problems drawn evenly and {problems} with long carries"
        for place in places.split(","):
            model: Any = load_model(Path(place), dtype=torch.float32).eval().to(device)  # type: ignore[arg-type]
            if task == "addition":
                measure = of_addition(model, problems)
            else:
                by_file = held_out_sequences(held_out or [], prompt + written, sequences)
                measure = of_text(model, torch.cat(list(by_file.values())), prompt)
                count = sum(map(len, by_file.values()))
                sample = f"{count} places of held-out text, {written} tokens each behind {prompt}"
            criteria = ("gate",) if name.endswith("-gate") else tuple(GRID)
            found.append(curves(model, measure, criteria, capped=capped))
        figures = {"seeds": found, "seconds": round(time.monotonic() - begun), "sample": sample}
        content["tasks"].setdefault(task, {})[name] = figures
        content |= {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": machine(),
            "versions": versions(),
        }
        write_text(output, json.dumps(content, separators=(",", ":")).replace('{"quality"', '\n{"quality"') + "\n")


if __name__ == "__main__":
    typer.run(main)
