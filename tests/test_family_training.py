"""MELT trained from the looped families: both phases run on prelude, core and coda."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family_checkpoints import CONFIGS, family
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltForCausalLM
from melt_models.checkpoint import load_model, open_weights, read_config
from melt_models.convert import melt_config, melt_state
from melt_models.core import Start
from melt_models.training.chunked import ChunkedForward, TeacherForward
from melt_models.training.config import read_run
from melt_models.training.errors import ConfigError
from melt_models.training.objectives import (
    DistillObjective,
    DistillOptions,
    StepSize,
    TeacherObjective,
    TeacherOptions,
)
from melt_models.training.stages import run

KINDS = list(CONFIGS)
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7], [2, 7, 18, 28, 18, 28, 45, 9, 4, 5]])


def pair(kind: str, directory: Path, **fields: Any) -> tuple[Any, LoopLMForCausalLM]:
    """A MELT with random gates, and the model that it was converted from, both in float32."""
    source = family(kind).write(directory)
    teacher: Any = load_model(source, dtype=torch.float32)
    config = melt_config(read_config(source), chunk_size=4, **fields)
    student = MeltForCausalLM(config).eval()
    state = {
        name: value.float().clone() for name, value in melt_state(config, open_weights(source, teacher.config)).items()
    }
    torch.manual_seed(1)
    state = {name: 0.3 * torch.randn_like(value) if "latent_gate" in name else value for name, value in state.items()}
    student.load_state_dict(state, strict=False)
    student.tie_weights()
    return student, teacher


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunk_wise_forward_reads_what_the_forward_reads(kind: str, tmp_path: Path) -> None:
    student, _ = pair(kind, tmp_path)
    seeds = torch.tensor([5, 6])
    with torch.no_grad():
        expected = student(IDS, start_seed=seeds)
        forward = ChunkedForward(student.model, student.config.total_ut_steps, start=Start(seeds))
        states = [forward.run(student.model.embed_tokens(IDS[:, at : at + 4])) for at in range(0, 10, 4)]
    logits = torch.cat([student.lm_head(state.read[-1]) for state in states], dim=1)
    assert torch.allclose(logits, expected.logits, atol=1e-4, rtol=1e-5)
    hidden = torch.cat([state.hidden for state in states], dim=2)
    assert torch.allclose(hidden, expected.loop_hidden, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_chunks_read_after_every_loop_what_its_forward_reads(kind: str, tmp_path: Path) -> None:
    _, teacher = pair(kind, tmp_path)
    loops, seeds = teacher.config.total_ut_steps, torch.tensor([5, 6])
    forward = TeacherForward(teacher, loops, Start(seeds))
    states = [forward.run(IDS[:, at : at + 4]) for at in range(0, 10, 4)]
    for loop in range(loops):
        logits = torch.cat([teacher.lm_head(state.read[loop]) for state in states], dim=1)
        with torch.no_grad():
            expected = teacher(IDS, exit_at_step=loop, start_seed=seeds).logits
        assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_at_alpha_zero_the_student_is_its_teacher(kind: str, tmp_path: Path) -> None:
    student, teacher = pair(kind, tmp_path)
    objective = DistillObjective(student, teacher, DistillOptions(interpolation="linear", attention_weight=1.0), seed=0)
    size = StepSize(labelled=IDS.numel(), sequences=len(IDS))
    first = objective(IDS, IDS, size, 0, 3, (0, 10)).parts
    assert float(first["kl_last"]) < 1e-6
    assert float(first["attention"]) < 1e-6
    last = objective(IDS, IDS, size, 2, 3, (0, 10)).parts
    assert float(last["kl_last"]) > 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_the_student_gets_a_gradient(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    student, teacher = pair(kind, tmp_path)
    options = DistillOptions(attention_weight=0.1, checkpointing=checkpointing, truncate=2)
    objective = DistillObjective(student.train(), teacher, options, seed=0)
    size = StepSize(labelled=IDS.numel(), sequences=len(IDS))
    for span in objective.spans(10):
        objective(IDS, IDS, size, 0, 1, span).total.backward()
    silent = [name for name, value in student.named_parameters() if value.grad is None or not value.grad.abs().sum()]
    assert not silent


@pytest.mark.parametrize("kind", ["nanbeige", "huginn", "olmo"])
def test_both_phases_train_a_melt_from_a_published_checkpoint(kind: str, tmp_path: Path) -> None:
    source = family(kind).write(tmp_path / "source")
    phase = {"steps": 4, "batch_size": 4, "learning_rate": 0.001, "warmup_steps": 1, "save_every": 2}
    content = {
        "output": str(tmp_path / "out"),
        "seed": 1,
        "threads": 1,
        "data": {"task": "addition", "digits": 2},
        "melt": {"chunk_size": 4},
        "teacher": {"checkpoint": str(source)},
        "phase1": phase,
        "phase2": phase,
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    config = read_run(file)
    run(config, config.stages())
    model = load_model(tmp_path / "out" / "phase2")
    assert isinstance(model, MeltForCausalLM)
    assert model.config.untrained == []
    assert model.config.num_prelude_layers == load_model(source).config.num_prelude_layers
    lines = (tmp_path / "out" / "metrics" / "phase2.jsonl").read_text().splitlines()
    assert len([json.loads(line)["loss"] for line in lines]) == 4


def test_without_an_exit_gate_neither_pretraining_nor_its_loss_is_offered(tmp_path: Path) -> None:
    student, teacher = pair("nanbeige", tmp_path)
    with pytest.raises(ConfigError, match="needs an exit gate"):
        TeacherObjective(teacher, TeacherOptions())
    with pytest.raises(ConfigError, match=r"exit_weight is 0\.1, but the model has no exit gate"):
        DistillObjective(student, teacher, DistillOptions(exit_weight=0.1), seed=0)
    assert isinstance(teacher.config, LoopLMConfig)
