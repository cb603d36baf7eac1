"""Evaluation: what is counted is what the model writes, at the depth and in the chunks that were asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltConfig, MeltForCausalLM
from melt_models.training.data import TaskBatches, character_tokenizer, make_batches
from melt_models.training.evaluate import Score, exact_match, greedy, perplexity
from melt_models.training.tasks import END, PAD, Addition, Example

TASK = Addition(digits=2)
IDS = {token: index for index, token in enumerate(TASK.vocabulary)}
FIELDS = {
    "vocab_size": len(TASK.vocabulary),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "total_ut_steps": 3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}
MODELS: dict[str, Any] = {"melt": (MeltForCausalLM, MeltConfig), "looplm": (LoopLMForCausalLM, LoopLMConfig)}
each_model = pytest.mark.parametrize("kind", list(MODELS))


def make(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    model, config = MODELS[kind]
    return model(config(**{**FIELDS, **({"chunk_size": 3} if kind == "melt" else {}), **fields})).eval()


def prompts(count: int = 100) -> torch.Tensor:
    """Token ids (count, 6), any but PAD and END."""
    return torch.randint(2, len(TASK.vocabulary), (count, 6), generator=torch.Generator().manual_seed(0))


def generated(model: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    """The three tokens that generate() writes after each prompt."""
    out = model.generate(ids, max_new_tokens=3, eos_token_id=None, do_sample=False, **settings)
    return out[:, ids.shape[1] :]


def as_examples(ids: torch.Tensor, written: torch.Tensor) -> tuple[list[str], list[Example], float]:
    """Examples that a model that writes ``written`` (batch, 3) answers right, up to their END.

    The vocabulary calls one token END that the model likes to write third; texts with that token before are left out.
    Returns the vocabulary, the examples, and the share of them after which the model really wrote END.
    """
    rows = [[*p, *w] for p, w in zip(ids.tolist(), written.tolist(), strict=True)]
    ends = [row[-1] for row in rows if row[-1] not in row[:-1]]
    end = max(set(ends), key=ends.count)
    names = list(TASK.vocabulary)
    names[IDS[PAD]], names[IDS[END]] = "#", "$"
    names[end] = END
    kept = [row for row in rows if end not in row[:-1]]
    texts = ["".join(names[token] for token in row[:-1]) for row in kept]
    return names, [Example(text[:-2], text[-2:]) for text in texts], ends.count(end) / len(kept)


@each_model
@pytest.mark.parametrize("num_loops", [1, 2, 3])
def test_decoding_writes_what_generate_writes(kind: str, num_loops: int) -> None:
    model, ids = make(kind), prompts()
    tokens, depth = greedy(model, ids, 3, {"num_loops": num_loops})
    assert torch.equal(tokens, generated(model, ids, num_loops=num_loops))
    assert len(tokens.unique(dim=0)) > 5
    assert torch.equal(depth, torch.full_like(depth, num_loops))


@each_model
def test_only_whole_answers_with_their_end_count(kind: str) -> None:
    model, ids = make(kind), prompts()
    names, examples, ended = as_examples(ids, generated(model, ids, num_loops=3))
    assert 0 < ended < 1
    assert exact_match(model, examples, names) == Score(ended, 3.0)
    tokens = [name for name in names if len(name) == 1]
    one_wrong = [Example(x.prompt, x.answer[0] + tokens[x.answer[1] == tokens[0]]) for x in examples]
    assert exact_match(model, one_wrong, names).accuracy == 0.0


@each_model
def test_the_score_does_not_depend_on_the_batch(kind: str) -> None:
    model, ids = make(kind), prompts()
    names, examples, ended = as_examples(ids, generated(model, ids, num_loops=2))
    scores = [exact_match(model, examples, names, num_loops=2, batch=batch) for batch in (1, 7, 500)]
    assert scores == [Score(ended, 2.0)] * 3


@each_model
def test_loops_are_the_mean_depth_of_the_written_tokens(kind: str) -> None:
    model, examples, found = make(kind), TASK.test_set(60), []
    ids = torch.tensor([[IDS[c] for c in x.prompt] for x in examples])
    for threshold in (0.0, 0.5, 0.8, 1.0):
        settings = {"num_loops": 3, "exit_threshold": threshold}
        tokens, _ = greedy(model, ids, 3, settings)
        with torch.no_grad():
            read = model(ids, **settings)
            after = model(tokens[:, :2], past_key_values=read.past_key_values, chunk_size=1, **settings)
        depth = torch.cat((read.depth[:, -1:], after.depth), 1)
        score = exact_match(model, examples, TASK.vocabulary, exit_threshold=threshold)
        assert score.loops == pytest.approx(depth.float().mean().item())
        found.append(score.loops)
    assert found[0] == 1.0 < found[1] < found[2] < found[3] == 3.0


def test_a_looplm_at_fewer_loops_is_the_whole_model_read_early() -> None:
    model, ids = make("looplm", early_exit_threshold=0.1), prompts()
    for loop in (1, 2, 3):
        early = generated(model, ids, num_loops=3, exit_at_step=loop - 1)
        names, examples, ended = as_examples(ids, early)
        assert ended > 0
        assert exact_match(model, examples, names, num_loops=loop) == Score(ended, loop)


def test_a_threshold_that_the_config_overrules_is_refused() -> None:
    with pytest.raises(ValueError, match="early_exit_step is 1"):
        exact_match(make("looplm", early_exit_step=1), TASK.test_set(2), TASK.vocabulary, exit_threshold=0.5)


def test_the_prompt_goes_in_chunks_of_the_size_asked_for() -> None:
    model, ids = make("melt"), prompts()
    written = {size: greedy(model, ids, 3, {"num_loops": 3, "chunk_size": size})[0] for size in (1, 3, 6)}
    assert torch.equal(written[3], greedy(model, ids, 3, {"num_loops": 3})[0])
    assert not torch.equal(written[1], written[6])
    for size, tokens in written.items():
        names, examples, ended = as_examples(ids, tokens)
        assert exact_match(model, examples, names, chunk_size=size).accuracy == ended > 0
        assert size == 1 or exact_match(model, examples, names, chunk_size=1).accuracy < ended


def test_examples_of_different_lengths_are_refused() -> None:
    model = make("melt")
    for examples in ([], [Example("1+1=", "2"), Example("10+1=", "1")]):
        with pytest.raises(ValueError, match="prompts of one length"):
            exact_match(model, examples, TASK.vocabulary)


@each_model
def test_a_model_that_knows_nothing_has_the_vocabulary_for_its_perplexity(kind: str) -> None:
    model = make(kind)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, TaskBatches(TASK, seed=0), 20) == pytest.approx(len(TASK.vocabulary), rel=1e-5)


@pytest.fixture
def held_out_text(tmp_path: Path) -> Any:
    """A function that opens a held-out stream of text; its tokens are those of the task."""
    character_tokenizer(TASK.vocabulary, 32).save_pretrained(tmp_path)
    numbers = np.random.default_rng(0).integers(0, 10**9, 50)
    (tmp_path / "numbers.txt").write_text("".join(f"{n}\n" for n in numbers))
    given = {"text": str(tmp_path / "numbers.txt"), "tokenizer": str(tmp_path), "sequence_length": 12}
    return lambda: make_batches({**given, "held_out_percent": 50}, seed=0, held_out=True)


@each_model
def test_perplexity_is_that_of_every_target_under_the_model(kind: str, held_out_text: Any) -> None:
    model = make(kind, early_exit_threshold=0.1)
    input_ids, targets = held_out_text().take(10, 1.0)
    exit_settings = {"exit_threshold": 1.0} if kind == "melt" else {"exit_at_step": 1}
    with torch.no_grad():
        chances = F.softmax(model(input_ids, num_loops=2, **exit_settings).logits, -1)
    expected = math.exp(-chances.gather(2, targets[..., None]).log().mean().item())
    for batch in (1, 4, 10):
        assert perplexity(model, held_out_text(), 10, num_loops=2, batch=batch) == pytest.approx(expected, rel=1e-4)


def test_perplexity_depends_on_the_chunk_size_that_was_asked_for(held_out_text: Any) -> None:
    model = make("melt")
    by_size = [perplexity(model, held_out_text(), 10, chunk_size=size) for size in (1, 3, 12)]
    assert by_size[1] == perplexity(model, held_out_text(), 10)
    assert len({round(x, 6) for x in by_size}) == 3


def test_perplexity_measures_the_same_sequences_every_time(held_out_text: Any) -> None:
    model, batches = make("melt"), held_out_text()
    assert perplexity(model, batches, 7) == perplexity(model, batches, 7)
    assert torch.equal(batches.take(3, 1.0).input_ids, held_out_text().take(3, 1.0).input_ids)


def test_perplexity_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="not defined"):
        perplexity(make("melt"), TaskBatches(TASK, seed=0), 0)
