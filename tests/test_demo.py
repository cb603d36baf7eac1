"""The shipped checkpoint does what the README says, and the scripts under examples/ run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MakePackage
from melt_models.checkpoint import load_model, read_config
from melt_runtime import Runtime

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from addition import Problem, accuracy, held_out_problems, sample  # noqa: E402
from demo import answers, mean_depth  # noqa: E402

CHECKPOINT = EXAMPLES / "addition-melt"


@pytest.fixture(scope="module")
def package(make_package: MakePackage) -> Path:
    return make_package(CHECKPOINT, max_batch=32)


def test_the_shipped_checkpoint_is_small_and_trained() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 5_000_000
    assert list(read_config(CHECKPOINT).untrained) == []
    assert load_model(CHECKPOINT).config.total_ut_steps == 4


def test_more_loops_get_more_right(package: Path) -> None:
    runtime = Runtime.load(package)
    problems = held_out_problems(100, seed=7, long_carries=True)
    right = [accuracy(problems, [g.text for g in answers(runtime, problems, loops)]) for loops in (1, 2, 3, 4)]
    assert right[0] < 0.5
    assert right == sorted(right)
    assert right[3] >= 0.95


def test_leaving_early_saves_loops_and_keeps_the_answers(package: Path) -> None:
    runtime = Runtime.load(package)
    problems = held_out_problems(100, seed=7, long_carries=True)
    early = answers(runtime, problems, 4, exit_threshold=0.99)
    assert accuracy(problems, [g.text for g in early]) >= 0.95
    assert mean_depth(early) < 2


def test_training_and_test_problems_cannot_overlap() -> None:
    import numpy as np

    trained = sample(np.random.default_rng(0), 2000, held_out=False)
    assert not any(problem.held_out for problem in trained)
    assert all(problem.held_out for problem in held_out_problems(200))


def test_a_problem_is_written_most_significant_digit_first() -> None:
    problem = Problem(42, 815)
    assert (problem.prompt, problem.answer) == ("0000042+0000815=", "0000857")


def test_the_demo_script_prints_the_table(package: Path) -> None:
    script = [sys.executable, str(EXAMPLES / "demo.py"), str(package), "--count", "32"]
    result = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for row in ("1 loop", "2 loops", "3 loops", "4 loops", "exit at 0.99"):
        assert row in result.stdout


def test_the_training_script_trains_and_saves_a_checkpoint(tmp_path: Path) -> None:
    script = [sys.executable, str(EXAMPLES / "train_addition.py"), "--output", str(tmp_path / "out"), "--steps", "2"]
    result = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert load_model(tmp_path / "out").config.vocab_size == 14
