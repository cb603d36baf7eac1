"""The YAML file of a run: what is read from it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from melt_models.training.config import RunConfig, Stage, StageConfig, read_run
from melt_models.training.errors import ConfigError
from melt_models.training.objectives import DistillOptions
from melt_models.training.trainer import make_accelerator, rate_at

GOOD = """
output: build/run
seed: 3
data: {task: addition, digits: 2}
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, embedding_std: 1}
melt: {chunk_size: 4}
teacher: {steps: 10, batch_size: 8, learning_rate: 3e-3, entropy_weight: 0.2}
phase1: {steps: 5}
phase2: {steps: 4, gate_learning_rate: 1e-3, betas: [0.9, 0.95], chunk_sizes: [4, 8]}
"""


def read(tmp_path: Path, text: str) -> RunConfig:
    """The run that a file with this text describes."""
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return read_run(file)


def stage(run: RunConfig, name: str) -> Stage:
    found = getattr(run, name)
    assert isinstance(found, Stage)
    return found


def test_a_stage_section_holds_the_trainers_fields_and_the_objectives(tmp_path: Path) -> None:
    run = read(tmp_path, GOOD)
    assert stage(run, "teacher").training == StageConfig(steps=10, batch_size=8, learning_rate=3e-3, seed=3)
    options = stage(run, "phase2").options
    assert isinstance(options, DistillOptions)
    assert options.chunk_sizes == (4, 8)
    assert stage(run, "phase2").training.betas == (0.9, 0.95)
    assert run.embedding_std == 1.0
    assert run.model == {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    assert stage(read(tmp_path, GOOD), "teacher").training.learning_rate == 0.003


def test_phases_begin_with_the_papers_rates_interpolation_and_alignment(tmp_path: Path) -> None:
    run = read(tmp_path, GOOD)
    first, second = stage(run, "phase1"), stage(run, "phase2")
    assert (first.training.learning_rate, first.training.gate_learning_rate) == (8e-6, 5e-4)
    assert isinstance(first.options, DistillOptions)
    assert isinstance(second.options, DistillOptions)
    assert (first.options.interpolation, first.options.attention_weight) == ("linear", 0.0)
    assert (second.options.interpolation, second.options.attention_weight) == ("none", 0.1)


def test_stages_are_those_with_steps_to_train(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD).stages() == ["teacher", "phase1", "phase2"]
    assert read(tmp_path, GOOD.replace("steps: 5", "steps: 0")).stages() == ["teacher", "phase2"]


def test_a_teacher_that_exists_is_named_by_its_directory(tmp_path: Path) -> None:
    (tmp_path / "ouro").mkdir()
    text = GOOD.replace(
        "teacher: {steps: 10, batch_size: 8, learning_rate: 3e-3, entropy_weight: 0.2}",
        f"teacher: {{checkpoint: {tmp_path / 'ouro'}}}",
    )
    run = read(tmp_path, text)
    assert run.teacher == tmp_path / "ouro"
    assert run.stages() == ["phase1", "phase2"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("entropy_weight: 0.2", "entropy_wait: 0.2", "section teacher has the unknown key 'entropy_wait'"),
        ("chunk_size: 4", "chunk: 4", "section melt has the unknown key 'chunk'"),
        ("hidden_size: 16", "hidden: 16", "section model has the unknown key 'hidden'"),
        ("seed: 3", "sead: 3", "has the unknown key 'sead'"),
        ("steps: 10", "steps: ten", "section teacher: steps is 'ten'; it must be a whole number"),
        ("steps: 10", "steps: 1.5", "section teacher: steps is 1.5; it must be a whole number"),
        ("steps: 10", "steps: true", "section teacher: steps is True; it must be a whole number"),
        ("steps: 10, ", "", "section teacher: steps is missing"),
        ("steps: 10", "steps: 0", "section teacher: steps is 0"),
        ("learning_rate: 3e-3", "learning_rate: .nan", "section teacher: learning_rate is nan"),
        ("learning_rate: 3e-3", "learning_rate: -1", "section teacher: learning_rate is -1.0; it must be above 0"),
        (
            "learning_rate: 3e-3",
            "learning_rate: 1e38",
            "section teacher: learning_rate is 1e+38; it must be at most 1e+30",
        ),
        ("batch_size: 8", "eval_sequences: 0", "section teacher: eval_sequences is 0; it must be 1 or more"),
        ("batch_size: 8", "eval_every: -1", "section teacher: eval_every is -1; it must be 0 or more"),
        ("batch_size: 8", "batch_size: 0", "section teacher: batch_size is 0; it must be 1 or more"),
        ("batch_size: 8", "optimizer: sgd", "section teacher: optimizer is 'sgd'; it must be one of adamw, muon"),
        ("betas: [0.9, 0.95]", "betas: [0.9]", "section phase2: betas is [0.9]; it must be a list of 2"),
        ("betas: [0.9, 0.95]", "betas: [0.9, 1.0]", "section phase2: betas are [0.9, 1.0]"),
        ("chunk_sizes: [4, 8]", "chunk_sizes: [0]", "section phase2: chunk_sizes are [0]"),
        ("chunk_sizes: [4, 8]", "distill: none", "section phase2: distill is 'none'"),
        ("hidden_size: 16", "hidden_size: -16", "section model: hidden_size is -16"),
        ("embedding_std: 1", "branch_scale: 0", "section model: branch_scale is 0.0; it must be above 0"),
        ("embedding_std: 1", "embedding_std: 0", "section model: embedding_std is 0.0; it must be above 0"),
        ("chunk_size: 4", "chunk_size: 0", "section melt: chunk_size is 0"),
        ("melt: {chunk_size: 4}", "melt: 4", "section melt is 4; it must be a mapping"),
        ("data: {task: addition, digits: 2}", "", "section data is missing"),
        ("output: build/run", "", "output is missing"),
        ("seed: 3", "seed: 3\nprecision: fp8", "precision is 'fp8'; it must be one of fp32, tf32, bf16"),
        ("seed: 3", "seed: 3\nthreads: 0", "threads must be 1 or more"),
        (
            "{steps: 10, batch_size: 8",
            "{checkpoint: nowhere, steps: 1",
            "steps, learning_rate, entropy_weight would have",
        ),
    ],
)
def test_a_wrong_file_is_refused_by_section_and_key(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert says in str(error.value)
    assert str(tmp_path / "run.yaml") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_teacher_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="section teacher: checkpoint nowhere is not a directory"):
        read(tmp_path, "output: out\ndata: {task: addition}\nteacher: {checkpoint: nowhere}\nphase1: {steps: 1}")


def test_a_file_without_stages_or_without_a_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no stage"):
        read(tmp_path, "output: out\ndata: {task: addition}")
    with pytest.raises(ConfigError, match="section teacher is missing"):
        read(tmp_path, "output: out\ndata: {task: addition}\nphase1: {steps: 1}")
    with pytest.raises(ConfigError, match="section model is missing"):
        read(tmp_path, "output: out\ndata: {task: addition}\nteacher: {steps: 1}")


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "a: [1", "just words"])
def test_what_is_no_mapping_of_sections_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_run(tmp_path / "absent.yaml")


def test_schedules_warm_up_and_then_fall() -> None:
    def rates(schedule: str) -> list[float]:
        config = StageConfig(steps=100, warmup_steps=4, schedule=schedule, final_rate=0.1)
        return [rate_at(config, step) for step in range(100)]

    assert [rates("constant")[step] for step in (0, 3, 99)] == [0.25, 1.0, 1.0]
    assert rates("flat-cosine")[50] == 1.0
    for schedule in ("cosine", "flat-cosine"):
        found = rates(schedule)
        assert found[4:] == sorted(found[4:], reverse=True)
        assert found[-1] == pytest.approx(0.1, abs=0.005)
    assert rates("cosine")[50] == pytest.approx(0.55)


def test_bf16_is_refused_where_the_hardware_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a T4")
    with pytest.raises(ConfigError, match="precision is bf16, which a T4 does not compute in; use fp32"):
        make_accelerator("bf16")
