"""``melt-train``: what it prints, and what it answers to bad input, a diverged run and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from melt_models.checkpoint import load_model
from melt_models.training.cli import app
from processes import LIMIT, started
from typer.testing import CliRunner

TEACHER = {"steps": 4, "batch_size": 4, "save_every": 2}
RUN: dict[str, Any] = {
    "data": {"task": "addition", "digits": 2},
    "model": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "total_ut_steps": 2,
    },
    "teacher": TEACHER,
    "phase1": {"steps": 2, "batch_size": 4},
}


def write(directory: Path, **sections: Any) -> str:
    """The YAML file of a tiny run whose output is beside it."""
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump({"output": str(directory / "out"), **RUN, **sections}))
    return str(file)


def melt_train(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def test_all_trains_every_stage_and_names_the_checkpoints(tmp_path: Path) -> None:
    done = melt_train("all", "--config", write(tmp_path))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "out" / "teacher"), str(tmp_path / "out" / "phase1")]
    assert load_model(tmp_path / "out" / "phase1").config.model_type == "melt"


def test_without_a_terminal_the_last_step_is_a_line(tmp_path: Path) -> None:
    done = melt_train("teacher", "--config", write(tmp_path))
    assert "teacher: step 4/4, loss " in done.stderr


def test_one_stage_goes_where_output_says(tmp_path: Path) -> None:
    done = melt_train("teacher", "--config", write(tmp_path), "--output", str(tmp_path / "elsewhere"))
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "elsewhere" / "teacher" / "config.json").is_file()
    assert not (tmp_path / "out").exists()


def test_a_second_run_needs_resume_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    file = write(tmp_path)
    assert melt_train("teacher", "--config", file).exit_code == 0
    refused = melt_train("teacher", "--config", file)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("melt-train: ")
    assert "exists already; pass --resume" in refused.stderr
    assert melt_train("teacher", "--config", file, "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"teacher": {**TEACHER, "stepz": 1}}, "section teacher has the unknown key 'stepz'"),
        ({"data": {"task": "juggling"}}, "juggling"),
        ({"data": {"text": ["absent.txt"], "tokenizer": "absent", "sequence_length": 8}}, "absent"),
        ({"model": {**RUN["model"], "vocab_size": 4}}, "the model of teacher only 4"),
        ({"teacher": {"checkpoint": "absent"}}, "checkpoint absent is not a directory"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path: Path, sections: dict[str, Any], says: str) -> None:
    done = melt_train("all", "--config", write(tmp_path, **sections))
    assert done.exit_code == 2, done.exception
    assert says in done.stderr
    assert done.stderr.startswith("melt-train: ")
    assert done.stderr.count("\n") == 1


def test_a_stage_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    done = melt_train("phase2", "--config", write(tmp_path))
    assert done.exit_code == 2
    assert "no section phase2 with steps to train; it has teacher, phase1" in done.stderr


def test_a_teacher_that_is_no_looplm_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    done = melt_train("phase1", "--config", write(tmp_path, teacher={"checkpoint": str(tiny_checkpoint)}))
    assert done.exit_code == 2
    assert "is a 'melt'; a teacher must be a LoopLM" in done.stderr


def test_a_teacher_that_says_minus_one_for_no_padding_is_taken(tmp_path: Path) -> None:
    assert melt_train("teacher", "--config", write(tmp_path)).exit_code == 0
    teacher = tmp_path / "out" / "teacher"
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "pad_token_id": -1}))
    done = melt_train("phase1", "--config", write(tmp_path, teacher={"checkpoint": str(teacher)}))
    assert done.exit_code == 0, done.exception
    assert "pad_token_id" not in json.loads((tmp_path / "out" / "phase1" / "generation_config.json").read_text())


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    done = melt_train("teacher", "--config", write(tmp_path))
    assert done.exit_code == 2
    assert str(tmp_path / "out") in done.stderr


def test_a_diverged_run_ends_with_exit_code_1_and_names_the_step(tmp_path: Path) -> None:
    done = melt_train("teacher", "--config", write(tmp_path, teacher={**TEACHER, "learning_rate": 1e30}))
    assert done.exit_code == 1
    assert "melt-train: training diverged in step " in done.stderr
    assert "the last good snapshot is kept" in done.stderr


def test_ctrl_c_ends_with_exit_code_130_and_resume_goes_on(tmp_path: Path) -> None:
    file = write(tmp_path, teacher={**TEACHER, "steps": 100000, "save_every": 5})
    command = [sys.executable, "-m", "melt_models.training.cli", "teacher", "--config", file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    record = tmp_path / "out" / "metrics" / "teacher.jsonl"
    with started(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None and not (record.is_file() and record.read_bytes().count(b"\n") >= 6):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 130, errors
    assert errors == "melt-train: stopped; the same command with --resume goes on from the last snapshot\n"
    assert list((tmp_path / "out" / "state" / "teacher").glob("step-*"))
