"""The shipped checkpoint does what the README says, and the scripts under examples/ run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MakePackage
from melt_models.checkpoint import load_model, read_config
from melt_models.training.tasks import Addition
from melt_runtime import Runtime

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from demo import accuracy, answers, held_out_problems, mean_depth  # noqa: E402

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
    problems = held_out_problems()[:100]
    right = [accuracy(problems, answers(runtime, problems, loops)) for loops in (1, 2, 3, 4)]
    assert right[0] < 0.5
    assert right == sorted(right)
    assert right[3] >= 0.95


def test_leaving_early_saves_loops_and_keeps_the_answers(package: Path) -> None:
    runtime = Runtime.load(package)
    problems = held_out_problems()[:100]
    early = answers(runtime, problems, 4, exit_threshold=0.99)
    assert accuracy(problems, early) >= 0.9
    assert mean_depth(early) < 3.7


def test_the_demos_problems_are_held_out_of_training() -> None:
    expected = Addition().test_set(200, hard=True)
    assert [tuple(problem) for problem in held_out_problems()] == [(x.prompt, x.answer) for x in expected]
    assert all(example.held_out for example in expected)


def test_the_demo_script_prints_the_table(package: Path) -> None:
    script = [sys.executable, str(EXAMPLES / "demo.py"), str(package), "--count", "32"]
    result = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for row in ("1 loop", "2 loops", "3 loops", "4 loops", "exit at 0.99"):
        assert row in result.stdout
