"""PEFT's adapters and TRL's trainer with their defaults, and the road from an adapter to a package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, MakeFamily, write_tokenizer
from datasets import Dataset
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltConfig, MeltForCausalLM
from melt_models.checkpoint import load_model
from melt_runtime import Runtime
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from melt_export.export import building
from melt_export.options import ExportOptions

peft = pytest.importorskip("peft")
KINDS = ["melt", "looplm", "huginn"]
IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7]


@pytest.fixture
def base(make_family: MakeFamily, tmp_path: Path) -> Any:
    """A function that writes a float32 checkpoint by the name of its kind."""

    def made(kind: str) -> Path:
        torch.manual_seed(0)
        model: Any
        if kind == "huginn":
            model = load_model(make_family("huginn"), dtype=torch.float32)
        elif kind == "looplm":
            model = LoopLMForCausalLM(LoopLMConfig(**TINY))
        else:
            model = MeltForCausalLM(MeltConfig(**TINY))
        model.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return made


def trainer_arguments(directory: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        gradient_checkpointing=True,
        max_steps=3,
        learning_rate=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_becomes_a_package(kind: str, base: Any, tmp_path: Path) -> None:
    directory = base(kind)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(directory), peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0)
    )
    adapted = {name.rsplit(".", 1)[1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q_proj", "v_proj"}  # as in a Llama
    rows = Dataset.from_dict({"input_ids": [IDS] * 8, "labels": [IDS] * 8})
    Trainer(model, trainer_arguments(tmp_path / "run"), train_dataset=rows).train()
    model.save_pretrained(tmp_path / "adapter")

    loaded = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        before = loaded(torch.tensor([IDS])).logits
    merged = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with building(tmp_path / "merged", tmp_path / "package", ExportOptions(max_seq_len=64)):
        pass
    with torch.no_grad():
        expected = model.eval()(torch.tensor([IDS])).logits
    assert not torch.allclose(before, expected, atol=1e-2)
    said = Runtime.load(tmp_path / "package").loops(IDS).logits
    assert said is not None
    np.testing.assert_allclose(said[-1], expected[0].numpy(), atol=1e-3)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_trl_fine_tunes_with_its_defaults(kind: str, adapter: bool, base: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    write_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    model = AutoModelForCausalLM.from_pretrained(base(kind))
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(output_dir=str(tmp_path / "run"), max_steps=3, learning_rate=0.1, use_cpu=True, report_to=[]),
        train_dataset=Dataset.from_dict({"text": ["hello world, 1+1=2", "a b c d e f g"] * 4}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM") if adapter else None,
    )
    assert trainer.args.gradient_checkpointing
    trainer.train()
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    if adapter:
        assert any(float(value.detach().abs().max()) > 0 for name, value in trained.items() if "lora_B" in name)
    else:
        assert any(not torch.equal(before[name], value) for name, value in trained.items())
