"""What transformers' own tools ask of a model: gradient checkpointing, hidden states, outputs, the Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, MakeFamily
from datasets import Dataset
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltConfig, MeltForCausalLM
from melt_models.checkpoint import load_model
from transformers import Trainer, TrainingArguments

KINDS = ["melt", "looplm", "huginn"]
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7], [2, 7, 18, 28, 18, 28, 45, 9, 4, 5]])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames gradient_checkpointing_enable
        yield


@pytest.fixture
def make(make_family: MakeFamily) -> Any:
    """A function that makes a random model in float32 by the name of its kind."""

    def made(kind: str, **fields: Any) -> Any:
        torch.manual_seed(0)
        if kind == "huginn":
            return load_model(make_family("huginn"), dtype=torch.float32)
        if kind == "looplm":
            return LoopLMForCausalLM(LoopLMConfig(**{**TINY, **fields})).eval()
        return MeltForCausalLM(MeltConfig(**{**TINY, "chunk_size": 4, **fields})).eval()

    return made


def gradients(model: Any, **arguments: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and every gradient of one training step."""
    model.train().zero_grad()
    loss = model(IDS, labels=IDS, **arguments).loss
    loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return float(loss.detach()), found


@pytest.mark.parametrize("settings", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind: str, settings: Any, make: Any) -> None:
    model = make(kind)
    loss, expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    again, found = gradients(model)
    assert loss == again
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-7, rtol=1e-5) for name in expected)
    model.gradient_checkpointing_disable()
    assert gradients(model)[0] == loss


def test_gradient_checkpointing_with_padding_and_early_exit_changes_no_gradient(make: Any) -> None:
    model = make("melt")
    torch.nn.init.normal_(model.model.early_exit_gate.weight, std=1.0)
    mask = torch.tensor([[1] * 10, [0] * 4 + [1] * 6])
    arguments = {"attention_mask": mask, "exit_threshold": 0.7}
    _, expected = gradients(model, **arguments)
    model.gradient_checkpointing_enable()
    _, found = gradients(model, **arguments)
    assert all(torch.allclose(found[name], expected[name], atol=1e-7, rtol=1e-5) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_keeps_fewer_tensors_for_the_backward_pass(kind: str, make: Any) -> None:
    def kept(model: Any) -> int:
        values: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            values[x.data_ptr()] = x.numel()
            return x

        ids = torch.randint(3, 45, (1, 128), generator=torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model.train()(ids, labels=ids).loss
        assert torch.isfinite(loss)
        return sum(values.values())

    model = make(kind)
    whole = kept(model)
    model.gradient_checkpointing_enable()
    assert kept(model) < whole / 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_in_the_cache_is_seen_under_gradient_checkpointing(kind: str, make: Any) -> None:
    model = make(kind)
    with torch.no_grad():
        cache = model(IDS[:, :4]).past_key_values
    arguments = {"attention_mask": torch.ones(2, 10)}

    def later(past: Any) -> torch.Tensor:
        return model(IDS[:, 4:], past_key_values=past, **arguments).logits

    model.train()
    expected = later(deepcopy(cache))
    model.gradient_checkpointing_enable()
    found = later(deepcopy(cache))
    assert torch.allclose(found, expected, atol=1e-6)
    found.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_the_embedding_every_loop_and_what_the_head_reads(kind: str, make: Any) -> None:
    model = make(kind)
    mask = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
    with torch.no_grad():
        out = model(IDS, attention_mask=mask, output_hidden_states=True)
        assert len(out.hidden_states) == model.config.total_ut_steps + 1
        assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(IDS))
        assert torch.allclose(model.lm_head(out.hidden_states[-1]), out.logits)
        assert torch.equal(torch.stack(out.hidden_states[1:-1]), out.loop_hidden[:-1])
        alone = model(IDS[1:, 3:], output_hidden_states=True).hidden_states
        for state, one in zip(out.hidden_states, alone, strict=True):
            assert torch.allclose(state[1:, 3:], one, atol=1e-5)
        assert model(IDS).hidden_states is None
        model.config.output_hidden_states = True
        assert model(IDS).hidden_states is not None


def test_hidden_states_of_chunks_that_left_early_keep_their_last_state(make: Any) -> None:
    model = make("melt")
    torch.nn.init.normal_(model.model.early_exit_gate.weight, std=3.0)
    with torch.no_grad():
        out = model(IDS, exit_threshold=0.5, output_hidden_states=True)
        assert len(set(out.depth.flatten().tolist())) > 1
        assert torch.allclose(model.lm_head(out.hidden_states[-1]), out.logits)
        for depth, *states in zip(out.depth[0], *(state[0] for state in out.hidden_states), strict=True):
            assert all(torch.equal(state, states[-1]) for state in states[int(depth) :])


@pytest.mark.parametrize("kind", KINDS)
def test_generate_returns_the_hidden_states_of_every_step(kind: str, make: Any) -> None:
    model = make(kind)
    said = model.generate(
        IDS,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_hidden_states=True,
    )
    assert [step[-1].shape[1] for step in said.hidden_states] == [10, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_returned_as_transformers_does(kind: str, make: Any) -> None:
    model = make(kind)
    with torch.no_grad():
        assert model(IDS).past_key_values.get_seq_length() == 10
        assert model(IDS, use_cache=False).past_key_values is None
        model.config.use_cache = False
        assert model(IDS).past_key_values is None
        given = model(IDS, use_cache=True).past_key_values
        assert given is not None
        # A cache that is given is filled, whatever is returned.
        out = model(IDS[:, :2], past_key_values=given, use_cache=False, attention_mask=torch.ones(2, 12))
        assert out.past_key_values is None
        assert given.get_seq_length() == 12


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_model_returns_what_the_head_reads(kind: str, make: Any) -> None:
    model = make(kind)
    with torch.no_grad():
        read = model.base_model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False)
        assert torch.equal(model.lm_head(read.last_hidden_state), model(IDS).logits)
        assert read.past_key_values is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_may_be_a_tuple_or_hold_chosen_logits(kind: str, make: Any) -> None:
    model = make(kind)
    with torch.no_grad():
        whole = model(IDS).logits
        assert torch.equal(model(IDS, return_dict=False)[0], whole)
        assert torch.allclose(model(IDS, logits_to_keep=2).logits, whole[:, -2:], atol=1e-6)
        assert torch.allclose(model(IDS, logits_to_keep=torch.tensor([1, 5])).logits, whole[:, [1, 5]], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_trains_and_evaluates(kind: str, make: Any, tmp_path: Path) -> None:
    model = make(kind)
    rows = Dataset.from_dict({"input_ids": IDS.tolist() * 4, "labels": IDS.tolist() * 4})
    seen: list[tuple[int, ...]] = []
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        gradient_checkpointing=True,
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )

    def note(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=note)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert seen[-1] == (8, 10, model.config.vocab_size)  # logits alone, of every row
    trainer.save_model(str(tmp_path / "saved"))
    saved: Any = load_model(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(saved(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_contradict_each_other_are_refused(kind: str, make: Any) -> None:
    model = make(kind)
    embeds = model.get_input_embeddings()(IDS).detach()
    for given in ({}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**given)
    for shape in ((1, 10), (2, 9), (2, 1, 10, 10)):
        with pytest.raises(ValueError, match="attention_mask has the shape"):
            model(IDS, attention_mask=torch.ones(shape))


@pytest.mark.parametrize("kind", ["looplm", "huginn"])
def test_tokens_that_ran_fewer_loops_cannot_be_followed_by_deeper_ones(kind: str, make: Any) -> None:
    model = make(kind)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        model(IDS[:, :1], past_key_values=cache, num_loops=2)
        with pytest.raises(ValueError, match="fewer than 3 loops"):
            model(IDS[:, :1], past_key_values=cache, num_loops=3)
        assert model(IDS[:, :1], past_key_values=cache, num_loops=2).logits.isfinite().all()
