"""Greedy decoding of a MELT in PyTorch, plain and with several tokens in flight: exact answers and runs per token.

    python benchmarks/staggered.py [CHECKPOINT] [PROBLEMS] [--count N] [--double]

A run is one pass of the loop step over the weights. "Staggered" is ``melt_models.decoding``. "Drafted" is the other
way to have several tokens in a run: draft a chunk with one loop per token, then run the chunk's other loops together,
and keep the tokens up to the first that was drafted wrongly. It computes what training does, prefill in chunks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from melt_models import MeltForCausalLM
from melt_models.cache import ChunkAttention, MeltCache
from melt_models.checkpoint import load_model
from melt_models.decoding import Decoded, TokensInFlight, greedy_tokens
from melt_runtime.text.end_tokens import configured_ends
from melt_runtime.text.tokenizer import TextTokenizer
from rich.console import Console
from rich.progress import track
from rich.table import Table

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MAX_TOKENS = 12
LANES = (2, 3, 4)
CHUNKS = (2, 4, 8)


@torch.no_grad()
def drafted_tokens(
    model: MeltForCausalLM, prompt: Sequence[int], max_tokens: int, chunk: int, stop_ids: Container[int]
) -> Decoded:
    """Decode greedily: draft a chunk with one loop per token, then run the chunk's other loops together."""
    core, loops, cache = model.model, model.config.total_ut_steps, MeltCache(model.config.first_cache("core", 1))
    output = model(torch.tensor([list(prompt)]), past_key_values=cache, exit_threshold=1.0, logits_to_keep=1)
    tokens, runs = [int(output.logits[0, -1].argmax())], 0
    while len(tokens) < max_tokens and tokens[-1] not in stop_ids:
        flight, word = TokensInFlight(core, cache), tokens[-1]
        while len(flight) < chunk and len(tokens) + len(flight) < max_tokens and word not in stop_ids:
            flight.enter(word)
            newest = torch.tensor([[done == 0 for done in flight.loops]])
            attend = ChunkAttention(model.config, cache, torch.ones_like(newest))
            flight.hidden[:, -1] = core.embed_tokens(torch.tensor([word]))
            step = core.loop_step(flight.hidden, flight.latent, newest, newest, attend)
            flight.hidden, flight.latent, flight.loops = step.hidden, step.latent, [1] * len(flight)
            word = int(model.lm_head(step.hidden[0, -1]).argmax())
            runs += 1
        for _ in range(loops - 1):
            read = flight.run()
            runs += 1
        words = model.lm_head(read[0]).argmax(-1).tolist()
        right = next((at for at in range(1, len(flight)) if flight.tokens[at] != words[at - 1]), len(flight))
        tokens += words[:right]
        flight.keep(right, right)
    return Decoded(tokens, runs)


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A MELT checkpoint with a tokenizer.")] = EXAMPLES
    / "addition-melt",
    problems: Annotated[Path, typer.Argument(help='JSON lines with "prompt" and "answer".')] = EXAMPLES
    / "addition_problems.jsonl",
    count: Annotated[int, typer.Option(help="Number of problems.", min=1)] = 200,
    double: Annotated[bool, typer.Option("--double", help="Compute in float64.")] = False,
) -> None:
    """Print a table of exact answers and runs per token."""
    model, tokenizer = load_model(checkpoint), TextTokenizer.load(checkpoint)
    assert isinstance(model, MeltForCausalLM)
    model = model.double() if double else model
    _, stops = configured_ends(checkpoint / "generation_config.json", model.config.to_dict())
    lines = [json.loads(line) for line in problems.read_text(encoding="utf-8").splitlines()[:count]]
    prompts = [tokenizer.encode(line["prompt"]) for line in lines]

    def greedy(decode: str, lanes: int | None = None) -> Callable[[list[int]], Decoded]:
        return lambda ids: greedy_tokens(model, ids, MAX_TOKENS, decode=decode, stop_ids=stops, lanes=lanes)  # type: ignore[arg-type]

    ways = {"plain": greedy("plain")}
    ways |= {f"staggered, {lanes} lanes": greedy("staggered", lanes) for lanes in LANES}
    for chunk in CHUNKS:
        ways[f"drafted, chunks of {chunk}"] = lambda ids, chunk=chunk: drafted_tokens(
            model, ids, MAX_TOKENS, chunk, stops
        )
    table, plain = Table("decoding", "exactly right", "as plain", "runs per token"), list[list[int]]()
    for name, decode in ways.items():
        found = [decode(ids) for ids in track(prompts, name, console=Console(stderr=True))]
        plain = plain or [one.tokens for one in found]
        right = sum(
            answer(tokenizer, one.tokens, stops) == line["answer"] for one, line in zip(found, lines, strict=True)
        )
        same = sum(one.tokens == tokens for one, tokens in zip(found, plain, strict=True))
        runs = sum(one.runs for one in found) / max(sum(len(one.tokens) - 1 for one in found), 1)
        table.add_row(name, f"{right / len(found):.1%}", f"{same} of {len(found)}", f"{runs:.2f}")
    Console().print(table)


def answer(tokenizer: TextTokenizer, tokens: list[int], stops: Container[int]) -> str:
    """Return the text before the first stop."""
    end = next((at for at, token in enumerate(tokens) if token in stops), len(tokens))
    return tokenizer.decode(tokens[:end])


if __name__ == "__main__":
    typer.run(main)
