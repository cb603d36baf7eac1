"""Measures an addition checkpoint on held-out problems: greedy decoding at every number of loops and exit threshold.

python examples/evaluate_addition.py examples/addition-melt
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from addition import ANSWER_TOKENS, VOCABULARY, Problem, accuracy, held_out_problems
from melt_models import MeltForCausalLM
from torch import Tensor

IDS = {token: index for index, token in enumerate(VOCABULARY)}
THRESHOLDS = (0.999, 0.99, 0.9, 0.7, 0.5)


class Score(NamedTuple):
    """Exact-match accuracy (0 to 1) and the mean number of loops that each written token took."""

    accuracy: float
    loops: float


class Report(NamedTuple):
    """Per test set: a Score for each number of loops (1 ... T, nobody leaves early) and for each exit threshold."""

    by_loops: dict[str, list[Score]]
    by_threshold: dict[str, list[Score]]


def encode(texts: list[str]) -> Tensor:
    """Texts of one length -> token ids (batch, tokens)."""
    return torch.tensor([[IDS[character] for character in text] for text in texts])


@torch.no_grad()
def write_answers(
    model: MeltForCausalLM, problems: list[Problem], num_loops: int, exit_threshold: float = 1.0
) -> tuple[list[str], Tensor]:
    """Greedy decoding of a batch: the prompt in chunks of the config's size, then one token at a time.

    Returns the completions, END included, and ``depth`` (batch, ANSWER_TOKENS): the loops before each token.
    """
    step, cache = encode([problem.prompt for problem in problems]), None
    tokens, depths = [], []
    for _ in range(ANSWER_TOKENS):
        output = model(
            step, past_key_values=cache, num_loops=num_loops, exit_threshold=exit_threshold, logits_to_keep=1
        )
        step, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        tokens.append(step)
        depths.append(output.depth[:, -1:])
    completions = ["".join(VOCABULARY[token] for token in row) for row in torch.cat(tokens, 1).tolist()]
    return completions, torch.cat(depths, 1)


def score(
    model: MeltForCausalLM, problems: list[Problem], num_loops: int, exit_threshold: float = 1.0, batch: int = 500
) -> Score:
    """Accuracy and mean loops a written token, over problems in batches."""
    completions, depths = [], []
    for at in range(0, len(problems), batch):
        texts, depth = write_answers(model, problems[at : at + batch], num_loops, exit_threshold)
        completions += texts
        depths.append(depth)
    return Score(accuracy(problems, completions), torch.cat(depths).float().mean().item())


def problem_sets(count: int, seed: int = 0) -> dict[str, list[Problem]]:
    """The two held-out sets: drawn evenly, and with long carries (see ``addition.sample``)."""
    return {
        "drawn evenly": held_out_problems(count, seed),
        "long carries": held_out_problems(count, seed, long_carries=True),
    }


def measure(model: MeltForCausalLM, count: int) -> Report:
    """Everything the model card says. ``count`` problems a set."""
    model.eval()
    sets, loops = problem_sets(count), range(1, model.config.total_ut_steps + 1)
    return Report(
        {name: [score(model, problems, n) for n in loops] for name, problems in sets.items()},
        {name: [score(model, problems, loops[-1], t) for t in THRESHOLDS] for name, problems in sets.items()},
    )


def tables(report: Report, count: int) -> str:
    """The report as two Markdown tables."""
    by_loops, by_threshold = report
    loops = range(1, len(next(iter(by_loops.values()))) + 1)
    lines = [f"| {count} held-out problems | " + " | ".join(f"{n} loop{'s' * (n > 1)}" for n in loops) + " |"]
    lines.append("|---" * (len(loops) + 1) + "|")
    for name, scores in by_loops.items():
        lines.append(f"| {name} | " + " | ".join(f"{s.accuracy:.1%}" for s in scores) + " |")
    lines += [
        "",
        "| exit threshold | " + " | ".join(f"{name}: accuracy, loops a token" for name in by_threshold) + " |",
    ]
    lines.append("|---" * (len(by_threshold) + 1) + "|")
    full = [f"{scores[-1].accuracy:.1%}, {scores[-1].loops:.2f}" for scores in by_loops.values()]
    lines.append("| 1 (never) | " + " | ".join(full) + " |")
    for index, threshold in enumerate(THRESHOLDS):
        row = [f"{s[index].accuracy:.1%}, {s[index].loops:.2f}" for s in by_threshold.values()]
        lines.append(f"| {threshold} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A directory with config.json and model.safetensors.")],
    count: Annotated[int, typer.Option(help="Held-out problems in each of the two sets.")] = 2000,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Prints exact-match accuracy at 1 ... T loops, and accuracy and loops spent at several exit thresholds."""
    torch.set_num_threads(threads)
    typer.echo(tables(measure(MeltForCausalLM.from_pretrained(checkpoint), count), count))


if __name__ == "__main__":
    typer.run(main)
