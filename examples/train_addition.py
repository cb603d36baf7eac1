"""Trains the demo checkpoint: a small MELT model that adds numbers, and needs its loops to get them right.

    python examples/train_addition.py --output examples/addition-melt

The prompt is one chunk and every answer token a chunk of its own, with its own number of loops: training runs what
decoding runs. Most of the training takes a cheaper approximation, with the whole (known) answer as one chunk.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from addition import ANSWER_TOKENS, DIGITS, END, PAD, PROMPT_TOKENS, VOCABULARY, Problem, sample
from evaluate_addition import IDS, encode, measure, problem_sets, score, tables
from melt_models import MeltCache, MeltConfig, MeltForCausalLM
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

CHUNK_SIZE = 16
LOOPS = 4
EARLIER_LOOPS_WEIGHT = 0.3  # of the loss of all loops but a token's last
EXACT_SHARE = 0.3  # of the steps, at the end: the answer token by token
CARRY_FREE_SHARE = 0.4  # of the steps, at the start: a falling share of the columns has no carry
NINES = 0.15  # share of the columns that are made to pass a carry on
EXAMPLE, SHORT = Problem(4829173, 3917458), Problem(42, 815)  # shown in the model card
CARD = Path(__file__).with_name("addition_card.md")


def build_model(width: int, heads: int, layers: int) -> MeltForCausalLM:
    """A new model. Embeddings start at the scale of the normed hidden states that later loops read."""
    config = MeltConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        total_ut_steps=LOOPS,
        chunk_size=CHUNK_SIZE,
        pad_token_id=IDS[PAD],
        eos_token_id=IDS[END],
    )
    model = MeltForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.generation_config = GenerationConfig(
        max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=IDS[END], pad_token_id=IDS[PAD]
    )
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, nothing added and nothing lost."""
    tokenizer = Tokenizer(models.WordLevel(dict(IDS)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def run_chunk(model: MeltForCausalLM, tokens: Tensor, cache: MeltCache, loops: int) -> Tensor:
    """tokens (batch, chunk) as one chunk after the cache -> hidden (loops, batch, chunk, d), of every loop."""
    hidden = model.model.embed_tokens(tokens)
    return model.model.run_chunk(hidden, torch.ones_like(tokens, dtype=torch.bool), cache, loops, 1.0).loop_hidden


def answer_states(
    model: MeltForCausalLM, prompt: Tensor, answer: Tensor, chunks: list[tuple[int, int]]
) -> tuple[Tensor, list[Tensor]]:
    """Teacher forcing. prompt (batch, PROMPT_TOKENS), answer (batch, ANSWER_TOKENS).

    ``chunks`` lists (tokens, loops) of the prompt and of the answer's chunks after it. Returns the prompt's hidden
    states but its last token's (loops, batch, PROMPT_TOKENS - 1, d), and for each answer chunk the states that
    predict it (loops, batch, tokens, d), the first of which is the last prompt token's.
    """
    cache = MeltCache(len(model.model.layers))
    states = run_chunk(model, prompt, cache, chunks[0][1])
    predicting, at = [states[:, :, -1:]], 0
    for tokens, loops in chunks[1:]:
        predicting.append(run_chunk(model, answer[:, at : at + tokens], cache, loops))
        at += tokens
    return states[:, :, :-1], predicting


def losses(
    model: MeltForCausalLM, prompt: Tensor, answer: Tensor, chunks: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """(language-model loss, exit-gate loss, last-loop cross-entropy): scalars.

    Every loop's state is read by the head; a token's last loop weighs 1, the earlier ones EARLIER_LOOPS_WEIGHT
    together. The exit gate reads detached states and learns whether that loop's prediction is already right; on the
    prompt's tokens, which predict nothing, it learns to stay.
    """
    prompt_states, predicting = answer_states(model, prompt, answer, chunks)
    gate, at, last = model.model.early_exit_gate, 0, []
    total, exit_loss = torch.zeros(()), torch.zeros(())
    for states in predicting:
        loops, _, tokens, _ = states.shape
        target = answer[:, at : at + tokens].expand(loops, -1, -1)
        logits = model.lm_head(states)
        entropy = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(loops, -1).mean(1)
        earlier = EARLIER_LOOPS_WEIGHT * entropy[:-1].mean() if loops > 1 else 0.0
        total = total + (entropy[-1] + earlier) * tokens / ANSWER_TOKENS
        last.append(entropy[-1].detach() * tokens / ANSWER_TOKENS)
        right = (logits.argmax(-1) == target).float()
        leave = gate(states.detach()).squeeze(-1)
        exit_loss = exit_loss + F.binary_cross_entropy_with_logits(leave, right) * tokens / ANSWER_TOKENS
        at += tokens
    stay = gate(prompt_states.detach()).squeeze(-1)
    exit_loss = exit_loss + F.binary_cross_entropy_with_logits(stay, torch.zeros_like(stay))
    return total, exit_loss, torch.stack(last).sum()


def chunk_plan(rng: random.Random, exact: bool) -> list[tuple[int, int]]:
    """(tokens, loops) of every chunk. A third of the exact steps give each chunk its own number of loops, as an exit
    threshold does."""

    def loops() -> int:
        return rng.choices(range(1, LOOPS + 1), [1] * (LOOPS - 1) + [3])[0]

    sizes = [PROMPT_TOKENS] + ([1] * (ANSWER_TOKENS - 1) if exact else [ANSWER_TOKENS - 1])
    same = loops()
    mixed = exact and rng.random() < 1 / 3
    return [(size, loops() if mixed else same) for size in sizes]


def optimizers(model: MeltForCausalLM, rate: float, matrix_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest (embedding, head, norms, biases, exit gate)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
        torch.optim.Muon(matrices, lr=matrix_rate, momentum=0.95, weight_decay=0.05),
    ]


def rate_at(step: int, steps: int) -> float:
    """The factor on both learning rates: warm-up over 50 steps, flat for half of the steps, then a cosine to 0.02."""
    done = step / steps
    decay = 1.0 if done < 0.5 else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - 0.5) / 0.5))
    return decay * min(1.0, (step + 1) / 50)


def as_batch(problems: list[Problem]) -> tuple[Tensor, Tensor]:
    """-> prompt (batch, PROMPT_TOKENS) and answer (batch, ANSWER_TOKENS), END included."""
    end = torch.full((len(problems), 1), IDS[END])
    return encode([p.prompt for p in problems]), torch.cat((encode([p.answer for p in problems]), end), 1)


def training_steps(
    model: MeltForCausalLM, seed: int, steps: int, batch: int, rates: tuple[float, float]
) -> Iterator[tuple[int, float]]:
    """Trains in place; yields (steps done, running mean of the last-loop cross-entropy) after each step."""
    rng, problems = random.Random(seed), np.random.default_rng(seed)
    made = optimizers(model, *rates)
    groups = [group for optimizer in made for group in optimizer.param_groups]
    full = [group["lr"] for group in groups]
    running = math.log(len(VOCABULARY))
    for step in range(steps):
        for group, rate in zip(groups, full, strict=True):
            group["lr"] = rate * rate_at(step, steps)
        easy = max(0.0, 1 - step / (CARRY_FREE_SHARE * steps))
        drawn = sample(problems, batch, held_out=False, carry_free=easy, nines=NINES * (1 - easy))
        exact = step >= (1 - EXACT_SHARE) * steps
        total, exit_loss, last = losses(model, *as_batch(drawn), chunk_plan(rng, exact))
        model.zero_grad()
        (total + exit_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in made:
            optimizer.step()
        running = 0.98 * running + 0.02 * last.item()
        yield step + 1, running


def save(model: MeltForCausalLM, directory: Path) -> None:
    """Writes the checkpoint and its tokenizer."""
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)


def write_card(directory: Path, facts: dict[str, object]) -> None:
    """Fills the model card in with what the task is and what was measured."""
    task = {"example_prompt": EXAMPLE.prompt, "example_answer": EXAMPLE.answer, "digits": DIGITS}
    task["padded"] = SHORT.prompt + SHORT.answer
    (directory / "README.md").write_text(CARD.read_text().format(**task, **facts))


def main(
    output: Annotated[Path, typer.Option(help="Where the checkpoint goes; the best so far is kept there.")],
    seed: Annotated[int, typer.Option(help="Of the weights, the problems and the numbers of loops.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 4000,
    batch: Annotated[int, typer.Option(help="Problems a step.")] = 96,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 64,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 2,
    layers: Annotated[int, typer.Option(help="Layers in the stack that is looped.")] = 1,
    rate: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 3e-3,
    matrix_rate: Annotated[float, typer.Option(help="Muon's learning rate.")] = 0.02,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 200,
    count: Annotated[int, typer.Option(help="Held-out problems in each set of the final evaluation.")] = 2000,
) -> None:
    """Trains, evaluates with real greedy decoding at 1 to 4 loops, and writes the checkpoint with its model card."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = build_model(width, heads, layers)
    parameters = sum(p.numel() for p in model.parameters())
    typer.echo(f"{parameters} parameters, {DIGITS} digits, {steps} steps of {batch} problems")
    quick, best, kept, started = problem_sets(200, seed=1), -1.0, 0, time.monotonic()
    for step, loss in training_steps(model, seed, steps, batch, (rate, matrix_rate)):
        if step % every and step != steps:
            continue
        result = {name: [score(model, s, n).accuracy for n in range(1, LOOPS + 1)] for name, s in quick.items()}
        shown = "; ".join(f"{name} " + " ".join(f"{x:.1%}" for x in row) for name, row in result.items())
        typer.echo(f"step {step}, {time.monotonic() - started:.0f} s, loss {loss:.4f}, loops 1-{LOOPS}: {shown}")
        if (total := sum(row[-1] for row in result.values())) > best:
            best, kept = total, step
            save(model, output)
    minutes = (time.monotonic() - started) / 60
    report = tables(measure(MeltForCausalLM.from_pretrained(output), count), count)
    typer.echo(f"trained in {minutes:.0f} minutes, kept step {kept}\n{report}")
    facts = {"steps": steps, "kept": kept, "minutes": f"{minutes:.0f}", "threads": threads, "seed": seed}
    facts |= {"batch": batch, "problems": f"{steps * batch:,}", "parameters": f"{parameters:,}", "tables": report}
    facts |= {"width": width, "heads": heads, "layers": layers, "torch": torch.__version__}
    write_card(output, facts)


if __name__ == "__main__":
    typer.run(main)
