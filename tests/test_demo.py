"""The shipped checkpoint does what the README says, and the scripts under examples/ run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MakePackage
from melt_models.checkpoint import load_model, read_config
from melt_models.training.tasks import Addition, Example
from melt_runtime import Package, Runtime
from melt_runtime.cli.demo import PROBLEMS, demo_package
from melt_runtime.cli.main import app
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from demo import accuracy, adaptive_answers, answers, held_out_problems, mean_depth, mixed_accuracy  # noqa: E402

CHECKPOINT = EXAMPLES / "addition-melt"
DEPTHS = ("1 loop", "2 loops", "3 loops", "4 loops")


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


def test_the_exit_is_calibrated_on_other_held_out_problems() -> None:
    lines = (EXAMPLES / "addition_calibration.jsonl").read_text().splitlines()
    found = {json.loads(line)["prompt"] for line in lines}
    assert len(found) == 200
    assert not found & {problem.prompt for problem in held_out_problems()}
    assert all(Example(prompt, "").held_out for prompt in found)


def test_each_token_with_the_loops_it_needs_beats_fixed_depths_of_as_many_loops(package: Path) -> None:
    runtime = Runtime.load(package)
    problems = held_out_problems()[:100]
    adaptive = adaptive_answers(runtime, problems, "entropy:0.3")
    mean = mean_depth(adaptive)
    assert mean < 2.1
    assert accuracy(problems, adaptive) >= accuracy(problems, answers(runtime, problems, 4)) - 0.01
    assert accuracy(problems, adaptive) >= mixed_accuracy(runtime, problems, mean) + 0.05


def test_the_demo_script_prints_the_table(package: Path) -> None:
    script = [sys.executable, str(EXAMPLES / "demo.py"), str(package), "--count", "32"]
    result = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for row in (*DEPTHS, "exit at 0.99", "entropy:0.3", "fixed depths, as many"):
        assert row in result.stdout


def test_every_install_brings_a_package_that_answers() -> None:
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if "+" in line and "│" in line]
    assert [row.count("✓") for row in rows][-1] >= 2
    assert all(row.split("│")[5].strip().endswith("✓") for row in rows)  # with all loops
    assert all(row.split("│")[6].strip().endswith("✓") for row in rows)  # with as many as each token needs
    assert 1 < float(re.search(r"([\d.]+) loops per token", result.stdout)[1]) < 3  # type: ignore[index]
    own = CliRunner().invoke(app, ["demo", "12+34", "0000055 + 5="])
    assert "0000046 ✓" in own.stdout
    assert "0000060 ✓" in own.stdout
    assert [f"{one}=" for one in PROBLEMS] == [problem.prompt for problem in held_out_problems()[: len(PROBLEMS)]]


def test_the_package_of_every_install_can_be_used_by_other_commands() -> None:
    where = CliRunner().invoke(app, ["demo", "--where"]).stdout.strip()
    assert CliRunner().invoke(app, ["generate", where, "4829173+3917458="]).stdout == "8746631\n"


@pytest.mark.parametrize("problem", ["1+", "2*3", "12345678+1", "9999999+1", "1+1+1", "١+١"])
def test_what_the_demo_cannot_add_is_refused_in_a_sentence(problem: str) -> None:
    result = CliRunner().invoke(app, ["demo", problem])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "digits" in result.stderr


def test_the_package_of_every_install_is_what_the_exporter_makes_of_the_shipped_checkpoint(
    make_package: MakePackage,
) -> None:
    shipped = Package.open(demo_package())
    made = Package.open(make_package(CHECKPOINT, dialect="portable", max_batch=8)).manifest
    names = {name for name in made.files if name.endswith((".data", ".txt", "tokenizer.json"))}
    assert {name: shipped.manifest.files[name] for name in names} == {name: made.files[name] for name in names}
    assert shipped.manifest.states == made.states
    assert shipped.manifest.format_version == made.format_version
    assert sum(file.stat().st_size for file in shipped.directory.iterdir()) < 400_000
