"""The trainer: losses fall, runs resume to the last bit, devices share a batch, and a NaN stops everything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from melt_models import LoopLMForCausalLM, MeltForCausalLM
from melt_models.checkpoint import load_model
from melt_models.errors import CheckpointError
from melt_models.training.config import RunConfig, StageConfig, read_run
from melt_models.training.errors import ConfigError, SnapshotError, TrainingDivergedError
from melt_models.training.objectives import TeacherObjective
from melt_models.training.stages import run
from melt_models.training.trainer import make_optimizers
from processes import LIMIT, started
from run_files import write_run

TEACHER = {"steps": 12, "batch_size": 8, "learning_rate": 0.003, "warmup_steps": 2, "save_every": 4}
PHASE = {"steps": 6, "batch_size": 8, "learning_rate": 0.001, "warmup_steps": 2, "save_every": 2}
RUN: dict[str, Any] = {
    "seed": 1,
    "threads": 1,
    "data": {"task": "addition", "digits": 2},
    "model": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "total_ut_steps": 2,
        "embedding_std": 1.0,
    },
    "melt": {"chunk_size": 4},
    "teacher": TEACHER,
    "phase1": PHASE,
    "phase2": PHASE,
}


def write(directory: Path, **sections: Any) -> Path:
    """The YAML file of a small run whose output is beside it; a section of None is left out."""
    return write_run(directory, RUN, **sections)


def prepare(directory: Path, **sections: Any) -> RunConfig:
    return read_run(write(directory, **sections))


def only_teacher(directory: Path, **fields: Any) -> RunConfig:
    """A run that has a teacher to train and nothing else."""
    return prepare(directory, phase1=None, phase2=None, teacher={**TEACHER, **fields})


def lines(output: Path, stage: str = "teacher") -> list[dict[str, Any]]:
    """The metrics of a stage without their times, which no two runs share."""
    text = (output / "metrics" / f"{stage}.jsonl").read_text()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in text.splitlines()]


def losses(output: Path, stage: str = "teacher") -> list[float]:
    return [line["loss"] for line in lines(output, stage)]


def interrupted(config: RunConfig, monkeypatch: pytest.MonkeyPatch, at: int, stage: str = "teacher") -> None:
    """Runs a stage and breaks it off in the middle of a step."""
    from melt_models.training import trainer

    original = trainer._Loop.step

    def step(self: Any, number: int, *rest: Any) -> Any:
        if number == at:
            raise KeyboardInterrupt
        return original(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Loop, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(config, [stage])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of all stages, never interrupted. Do not change it."""
    config = prepare(tmp_path_factory.mktemp("whole"))
    run(config, config.stages())
    return config.output


def test_all_stages_end_as_checkpoints_whose_parts_are_trained(whole: Path) -> None:
    assert isinstance(load_model(whole / "teacher"), LoopLMForCausalLM)
    for phase in ("phase1", "phase2"):
        model = load_model(whole / phase)
        assert isinstance(model, MeltForCausalLM)
        assert model.dtype == torch.float32
        assert list(model.config.untrained) == []
        assert (model.config.chunk_size, model.config.total_ut_steps) == (4, 2)
        assert (whole / phase / "tokenizer.json").is_file()
        assert json.loads((whole / phase / "generation_config.json").read_text())["eos_token_id"] is not None


def test_a_finished_run_leaves_no_snapshots(whole: Path) -> None:
    assert list((whole / "state").rglob("*.pt")) == []


def test_each_phase_starts_where_the_one_before_ended(whole: Path) -> None:
    first = losses(whole, "phase1")
    assert first[0] == pytest.approx(0.0, abs=1e-6)  # alpha = 0 is the teacher itself
    teacher, before, after = (load_model(whole / name).state_dict() for name in ("teacher", "phase1", "phase2"))
    name = "model.layers.0.self_attn.q_proj.weight"
    near = (before[name] - teacher[name]).abs().max()
    assert 0 < near < 0.02
    assert 0 < (after[name] - before[name]).abs().max() < 0.02
    gate = "model.layers.0.latent_gate.input_proj.weight"
    assert before[gate].abs().max() > 0
    assert not torch.equal(before[gate], after[gate])


def test_the_loss_of_a_small_task_falls(tmp_path: Path) -> None:
    config = only_teacher(tmp_path, steps=60, save_every=100)
    run(config, ["teacher"])
    found = losses(config.output)
    assert sum(found[-5:]) < 0.85 * sum(found[:5])


def test_metrics_name_the_loss_its_parts_the_rates_and_what_was_seen(whole: Path) -> None:
    last = lines(whole, "phase2")[-1]
    assert {"step", "loss", "kl", "attention", "learning_rate", "gate_learning_rate", "gradient_norm", "tokens"} <= set(
        last
    )
    assert last["step"] == 6
    per_step = lines(whole, "phase2")[0]["tokens"]
    assert last["tokens"] == 6 * per_step


def test_killed_at_any_moment_a_run_resumes_to_the_same_bits(tmp_path: Path, whole: Path) -> None:
    file = write(tmp_path)
    output, command = tmp_path / "out", [sys.executable, "-m", "melt_models.training.cli", "all", "--config", str(file)]
    record = output / "metrics" / "teacher.jsonl"
    with started(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (record.is_file() and record.read_bytes().count(b"\n") >= 6):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait(LIMIT) == -signal.SIGKILL
    assert not (output / "phase2").exists()
    config = read_run(file)
    run(config, config.stages(), resume=True)
    for stage in config.stages():
        assert lines(output, stage) == lines(whole, stage)
        expected = load_model(whole / stage).state_dict()
        assert all(
            torch.equal(value, expected[name]) for name, value in load_model(output / stage).state_dict().items()
        )


def test_a_phase_broken_off_between_snapshots_resumes_to_the_same_bits(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = only_teacher(tmp_path)
    interrupted(config, monkeypatch, at=7)
    assert [line["step"] for line in lines(config.output)] == [1, 2, 3, 4, 5, 6, 7]
    torch.manual_seed(12345)
    run(config, ["teacher"], resume=True)
    assert lines(config.output) == lines(whole)


def test_metric_lines_after_a_resume_are_consecutive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = only_teacher(tmp_path)
    interrupted(config, monkeypatch, at=6)
    with (config.output / "metrics" / "teacher.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # torn by the kill
    run(config, ["teacher"], resume=True)
    assert [line["step"] for line in lines(config.output)] == list(range(1, 13))


def test_micro_batches_add_up_to_the_whole_batch(tmp_path: Path) -> None:
    found = []
    for micro in (8, 3):
        config = only_teacher(tmp_path / str(micro), micro_batch=micro)
        run(config, ["teacher"])
        found.append(losses(config.output))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0] != found[1]


def test_two_processes_match_one_at_equal_batch(tmp_path: Path, whole: Path) -> None:
    file = write(tmp_path)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, "-m", "melt_models.training.cli", "all", "--config", str(file)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("phase2") == 1  # only one of them speaks
    for stage in ("teacher", "phase1", "phase2"):
        assert losses(tmp_path / "out", stage) == pytest.approx(losses(whole, stage), rel=1e-3, abs=1e-4)
        assert lines(tmp_path / "out", stage)[-1]["tokens"] == lines(whole, stage)[-1]["tokens"]
        ended, expected = (lines(output, stage)[-1] for output in (tmp_path / "out", whole))
        assert ended["eval_loss_1"] == pytest.approx(expected["eval_loss_1"], rel=1e-3)
        assert ended["eval_exact"] == pytest.approx(expected["eval_exact"], abs=0.02)
    assert losses(tmp_path / "out") != losses(whole)  # it was not one process after all


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 3)
    with pytest.raises(ConfigError, match="batch_size is 8, which 3 processes cannot share"):
        run(only_teacher(tmp_path), ["teacher"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_snapshot(tmp_path: Path) -> None:
    config = only_teacher(tmp_path, learning_rate=1e30, warmup_steps=0, save_every=1)
    with pytest.raises(TrainingDivergedError) as error:
        run(config, ["teacher"])
    says = str(error.value)
    kept = sorted((config.output / "state" / "teacher").glob("step-*"))
    failed = int(kept[-1].name.removeprefix("step-")) + 1
    assert f"diverged in step {failed}: loss " in says
    assert "gradient norm nan" in says
    assert "the largest gradient is model." in says
    assert not (config.output / "teacher").exists()
    assert len(lines(config.output)) == failed - 1
    with pytest.raises(TrainingDivergedError) as again:  # the snapshot loads, and the same step diverges
        run(config, ["teacher"], resume=True)
    assert str(again.value) == says


@pytest.mark.parametrize("loss", [True, False])
def test_what_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: bool) -> None:
    original = TeacherObjective.forward

    def spoil(self: Any, input_ids: Any, targets: Any, size: Any, step: int, *rest: Any) -> Any:
        found = original(self, input_ids, targets, size, step, *rest)
        weight = self.model.model.layers[0].mlp.up_proj.weight
        infinite = (weight * 0).sqrt().sum()  # 0, with an infinite slope
        return found._replace(total=found.total + infinite * (torch.inf if loss else 1)) if step == 2 else found

    monkeypatch.setattr(TeacherObjective, "forward", spoil)
    with pytest.raises(TrainingDivergedError) as error:
        run(only_teacher(tmp_path), ["teacher"])
    assert ("diverged in step 3: loss nan" in str(error.value)) == loss
    assert "the largest gradient is model.model.layers.0.mlp.up_proj.weight's, nan" in str(error.value)


def test_without_resume_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    config = only_teacher(tmp_path)
    interrupted(config, monkeypatch, at=5)
    with pytest.raises(SnapshotError, match=r"holds a snapshot of an unfinished run; pass --resume"):
        run(config, ["teacher"])
    shutil.copytree(whole / "teacher", config.output / "teacher")
    with pytest.raises(SnapshotError, match=r"teacher exists already; pass --resume"):
        run(config, ["teacher"])


def test_with_resume_a_finished_stage_is_not_trained_again(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    before = (tmp_path / "out" / "teacher" / "model.safetensors").stat().st_mtime_ns
    config = prepare(tmp_path)
    run(config, config.stages(), resume=True)
    assert (tmp_path / "out" / "teacher" / "model.safetensors").stat().st_mtime_ns == before
    assert lines(tmp_path / "out") == lines(whole)


@pytest.mark.parametrize("at", [5, None])
def test_other_settings_are_refused_by_name(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, at: int | None
) -> None:
    config = only_teacher(tmp_path)
    if at is None:
        shutil.copytree(whole, config.output)
    else:
        interrupted(config, monkeypatch, at)
    changed = only_teacher(tmp_path, batch_size=16, save_every=3)
    with pytest.raises(SnapshotError) as error:
        run(changed, ["teacher"], resume=True)
    assert "(batch_size was 8, is 16); restore them" in str(error.value)


def test_how_often_it_is_saved_may_change(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(only_teacher(tmp_path), monkeypatch, at=5)
    changed = only_teacher(tmp_path, save_every=5)
    run(changed, ["teacher"], resume=True)
    assert lines(changed.output) == lines(whole)


def test_a_phase_with_another_teacher_is_refused(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    teacher = tmp_path / "out" / "teacher"
    model = load_model(teacher)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(teacher)
    with pytest.raises(SnapshotError, match="teacher's weights was"):
        run(prepare(tmp_path), ["phase2"], resume=True)


def test_a_damaged_newest_snapshot_gives_way_to_the_one_before(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = only_teacher(tmp_path)
    interrupted(config, monkeypatch, at=10)
    newest = sorted((config.output / "state" / "teacher").glob("step-*"))[-1] / "training.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run(config, ["teacher"], resume=True)
    assert "step-000000008 is damaged" in capsys.readouterr().err
    assert lines(config.output) == lines(whole)


def test_when_every_snapshot_is_damaged_the_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = only_teacher(tmp_path)
    interrupted(config, monkeypatch, at=10)
    for record in (config.output / "state" / "teacher").rglob("snapshot.json"):
        record.write_text("{")
    with pytest.raises(SnapshotError, match=r"every snapshot in .* is damaged"):
        run(config, ["teacher"], resume=True)


def test_the_newest_snapshot_and_its_predecessor_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = only_teacher(tmp_path, save_every=1)
    interrupted(config, monkeypatch, at=6)
    kept = sorted(path.name for path in (config.output / "state" / "teacher").glob("step-*"))
    assert kept == ["step-000000005", "step-000000006"]


def test_without_phase1_the_second_phase_starts_from_the_converted_teacher(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole / "teacher", tmp_path / "ouro")
    config = prepare(tmp_path, teacher={"checkpoint": str(tmp_path / "ouro")}, model=None, phase1=None)
    run(config, config.stages())
    model = load_model(config.output / "phase2")
    assert list(model.config.untrained) == []
    assert losses(config.output, "phase2")[0] > 0


def test_the_second_phase_goes_on_with_a_finished_melt(tmp_path: Path, whole: Path) -> None:
    sections: dict[str, Any] = {"teacher": {"checkpoint": str(whole / "teacher")}, "model": None, "phase1": None}
    unmoved = {**PHASE, "steps": 1, "learning_rate": 1e-12, "gate_learning_rate": 1e-12}
    config = prepare(tmp_path, **sections, phase2={**unmoved, "checkpoint": str(whole / "phase2")})
    run(config, config.stages())
    before, after = (load_model(output / "phase2").state_dict() for output in (whole, config.output))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)

    wrong = prepare(tmp_path, **sections, output="wrong", phase2={**PHASE, "checkpoint": str(whole / "teacher")})
    with pytest.raises(CheckpointError, match="teacher is a 'ouro'; phase2 goes on with a MELT"):
        run(wrong, ["phase2"])
    with pytest.raises(ConfigError, match="so phase1 would have no effect"):
        prepare(tmp_path, **sections | {"phase1": PHASE}, phase2={**PHASE, "checkpoint": str(whole / "phase2")})


def test_a_melt_of_another_shape_than_its_teacher_is_refused(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole / "phase2", tmp_path / "melt")
    config = tmp_path / "melt" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"total_ut_steps": 3}))
    sections: dict[str, Any] = {"teacher": {"checkpoint": str(whole / "teacher")}, "model": None, "phase1": None}
    other = prepare(tmp_path, **sections, phase2={**PHASE, "checkpoint": str(tmp_path / "melt")})
    with pytest.raises(CheckpointError, match=r"has total_ut_steps 3 and its teacher .* 2; they must be equal"):
        run(other, ["phase2"])


def test_a_phase_whose_start_is_not_there_is_refused(tmp_path: Path, whole: Path) -> None:
    config = prepare(tmp_path)
    with pytest.raises(ConfigError, match="phase1 needs the teacher"):
        run(config, ["phase1"])
    shutil.copytree(whole / "teacher", config.output / "teacher")
    with pytest.raises(ConfigError, match=r"phase2 starts from .*phase1, which is not there"):
        run(config, ["phase2"])


def test_muon_takes_the_matrices_and_gates_have_their_own_rate(whole: Path) -> None:
    model = load_model(whole / "phase1")
    config = StageConfig(steps=1, optimizer="muon", learning_rate=0.1, matrix_learning_rate=0.2, gate_learning_rate=0.3)
    rest, muon = make_optimizers(model, config)
    rates = {
        id(p): (type(one).__name__, g["lr"]) for one in (rest, muon) for g in one.param_groups for p in g["params"]
    }
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    layer = "model.layers.0."
    assert found[layer + "mlp.up_proj.weight"] == ("Muon", 0.2)
    assert found[layer + "latent_gate.input_proj.weight"] == ("Muon", 0.3)
    assert found[layer + "latent_gate.bias"] == ("AdamW", 0.3)
    assert found["lm_head.weight"] == ("AdamW", 0.1)
    assert len(found) == len(rates)


def test_a_run_with_muon_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    for name in ("straight", "broken"):
        config = only_teacher(tmp_path / name, optimizer="muon")
        if name == "broken":
            interrupted(config, monkeypatch, at=6)
        run(config, ["teacher"], resume=name == "broken")
        outputs.append(config.output)
    assert lines(outputs[0]) == lines(outputs[1])


def test_bf16_trains_beside_float32_weights(tmp_path: Path, whole: Path) -> None:
    config = prepare(tmp_path, precision="bf16")
    run(config, config.stages())
    assert losses(config.output) == pytest.approx(losses(whole), rel=0.05)
    assert losses(config.output) != losses(whole)
    assert load_model(config.output / "phase2").dtype == torch.float32
