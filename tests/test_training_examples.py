"""The example files of training: what they say is accepted, and they train, evaluate and end as checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from melt_models import LoopLMConfig, LoopLMForCausalLM
from melt_models.checkpoint import load_model
from melt_models.training.cli import app
from melt_models.training.data import character_tokenizer
from melt_models.training.tasks import END, PAD
from typer.testing import CliRunner

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CHARACTERS = (PAD, END, *"abcdefghijklmnopqrstuvwxyz0123456789 \n")
TEACHER, DATA_SET = "ByteDance/Ouro-1.4B", "HuggingFaceFW/fineweb-edu"
CARD = """---
configs:
- config_name: sample-10BT
  data_files: sample/10BT/*
---
"""


def stand_ins(directory: Path) -> None:
    """Directories with the names that the example gives on a hub: a tiny Ouro and a data set with a subset."""
    torch.manual_seed(0)
    config = LoopLMConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        total_ut_steps=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    LoopLMForCausalLM(config).save_pretrained(directory / TEACHER)
    character_tokenizer(CHARACTERS, 64).save_pretrained(directory / TEACHER)
    files = directory / DATA_SET / "sample" / "10BT"
    files.mkdir(parents=True)
    (directory / DATA_SET / "README.md").write_text(CARD)
    for part in range(2):
        rows = (json.dumps({"text": f"document {n} of part {part}", "score": 3.5}) for n in range(100))
        (files / f"{part:03d}_00000.jsonl").write_text("".join(row + "\n" for row in rows))


def shortened(content: dict[str, Any]) -> dict[str, Any]:
    """The example with few steps, short sequences and small chunks; all else as it is."""
    content["data"] |= {"sequence_length": 24, "held_out_percent": 10}
    content["melt"]["chunk_size"] = 8
    for phase in ("phase1", "phase2"):
        content[phase] |= {"steps": 2, "batch_size": 2, "eval_every": 1, "chunk_sizes": [1, 8], "eval_sequences": 3}
    return {**content, "precision": "fp32"}


def test_the_ouro_example_distills_a_checkpoint_on_a_data_set_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("ouro.yaml").write_text(yaml.safe_dump(shortened(yaml.safe_load((EXAMPLES / "ouro.yaml").read_text()))))
    done = CliRunner().invoke(app, ["all", "--config", "ouro.yaml"])
    assert done.exit_code == 0, done.stderr or done.exception
    assert "never draws" not in done.stderr
    lines = [json.loads(line) for line in Path("build/ouro-melt/metrics/phase2.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_perplexity_2" in line] == [1, 2]
    assert load_model(Path("build/ouro-melt/phase2")).config.model_type == "melt"
    shown = CliRunner().invoke(app, ["eval", "build/ouro-melt", "--json", "--chunk-size", "1", "--sequences", "3"])
    assert list(json.loads(shown.stdout)) == ["teacher", "phase1, chunks of 1", "phase2, chunks of 1"]


@pytest.mark.parametrize("name", ["addition", "ouro", "text"])
def test_every_example_is_a_file_that_melt_train_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from melt_models.training.config import read_run

    (tmp_path / TEACHER).mkdir(parents=True)
    shutil.copy(EXAMPLES / f"{name}.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert read_run(Path(f"{name}.yaml")).stages()[-2:] in (["phase1", "phase2"], ["phase2", "gate"])
