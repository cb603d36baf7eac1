"""``--exit auto:Q``: the exit that saves the most loops and keeps the quality that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage, write_tokenizer
from melt_models.checkpoint import open_checkpoint
from melt_runtime import ArgumentError, Package, Runtime
from melt_runtime.progress import Step, no_progress
from typer.testing import CliRunner

from melt_export.cli import export_app
from melt_export.errors import ExportError
from melt_export.export import build_package
from melt_export.options import ExitOptions, ExportOptions
from melt_export.parity.exit_calibration import Run, Setting, calibrate, calibrated_exit, depths, lost

EXAMPLES = Path(__file__).parent.parent / "examples"
ADDITION, PROBLEMS = EXAMPLES / "addition-melt", EXAMPLES / "addition_problems.jsonl"


def export(output: Path, *arguments: str) -> Any:
    request = ["--checkpoint", str(ADDITION), "--output", str(output), "--no-verify", *arguments]
    return CliRunner().invoke(export_app, request)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The addition package, exported with a calibrated exit, and what the export printed."""
    output = tmp_path_factory.mktemp("calibrated") / "package"
    done = export(output, "--exit", "auto:1pt", "--exit-text", str(PROBLEMS))
    assert done.exit_code == 0, done.output
    return output, " ".join(done.output.split())


def test_the_exit_saves_half_the_loops_and_is_said(calibrated: tuple[Path, str]) -> None:
    package, printed = calibrated
    found = Package.open(package).manifest.exit
    assert found["quality"] == "1pt"
    assert found["loss"] <= 1.0
    assert found["loops"] < 0.6 * found["full_loops"]
    assert f"{found['criteria']} keeps 1pt" in printed


def test_auto_answers_as_all_loops_do_but_for_the_points_that_were_given(calibrated: tuple[Path, str]) -> None:
    runtime = Runtime.load(calibrated[0])
    prompts = [json.loads(line)["prompt"] for line in PROBLEMS.read_text().splitlines()]
    full, early = (runtime.generate(prompts, max_tokens=9, exit=exits) for exits in ("never", "auto"))
    differing = sum(a.text != b.text for a, b in zip(full, early, strict=True))
    assert differing <= 0.01 * len(prompts)
    assert sum(sum(g.depth) for g in early) < sum(sum(g.depth) for g in full)


def test_a_text_calibrates_by_perplexity(tmp_path: Path) -> None:
    text = tmp_path / "sums.txt"
    text.write_text("".join(json.loads(line)["prompt"] for line in PROBLEMS.read_text().splitlines()))
    done = export(tmp_path / "package", "--exit", "auto:5%", "--exit-text", str(text))
    assert done.exit_code == 0, done.output
    found = Package.open(tmp_path / "package").manifest.exit
    assert found["quality"] == "5%"
    assert found["loss"] <= 5.0
    assert found["text"] == "sums.txt"


@pytest.mark.parametrize("text", ["auto", "auto:1", "1pt", "auto:1 pt", "auto:-1pt", "auto:200pt", "auto:x%", "never"])
def test_a_quality_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ExportError, match="--exit is"):
        ExitOptions(text)


def test_a_quality_says_how_much_of_what() -> None:
    assert [(one.most, one.unit) for one in map(ExitOptions, ("auto:0.5%", "auto:1pt"))] == [(0.5, "%"), (1.0, "pt")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--exit-text", str(PROBLEMS)], "--exit-text needs --exit"),
        (["--exit", "auto:1pt"], "--exit needs --exit-text"),
        (["--exit", "auto:1%", "--exit-text", str(PROBLEMS)], "on which --exit takes points"),
        (["--exit", "sometimes"], "it must be auto:N%"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_sentence(tmp_path: Path, arguments: list[str], says: str) -> None:
    done = export(tmp_path / "package", *arguments)
    assert isinstance(done.exception, ArgumentError | ExportError)
    assert says in str(done.exception)
    assert not (tmp_path / "package").exists()


def test_a_calibration_that_cannot_follow_is_refused_before_the_export(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("melt_export.export.trace_graphs", None)
    one, some = make_checkpoint(total_ut_steps=1), make_checkpoint()
    with pytest.raises(ArgumentError, match="nothing to save: the package runs one loop per token"):
        build_package(one, tmp_path / "one", ExportOptions(exit=ExitOptions("auto:1pt")))
    with pytest.raises(ArgumentError, match="--exit needs --exit-text"):
        build_package(some, tmp_path / "some", ExportOptions(exit=ExitOptions("auto:1pt")))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"prompt": 1, "answer": "2"}', "line 1 is not a JSON object"),
        ('{"prompt": "2+2=", "answer": "4"}', "has 1 problem; it must have 2 or more"),
    ],
)
def test_problems_that_cannot_be_used_are_refused_in_a_sentence(tmp_path: Path, lines: str, says: str) -> None:
    (tmp_path / "problems.jsonl").write_text(lines)
    done = export(tmp_path / "package", "--exit", "auto:1pt", "--exit-text", str(tmp_path / "problems.jsonl"))
    assert isinstance(done.exception, ArgumentError)
    assert says in str(done.exception)


def calibrated_on(text: str, checkpoint: Path, package: Path, directory: Path, quality: str) -> dict[str, Any]:
    """What a package is calibrated to on a text."""
    (directory / "text.txt").write_text(text)
    manifest, weights = Package.open(package).manifest, open_checkpoint(checkpoint)[1]
    return calibrated_exit(package, manifest, ExitOptions(quality, directory / "text.txt"), weights)


SENTENCE = "a quick brown fox jumps over the lazy dog, and 12 more. "


def test_a_looplm_is_calibrated_to_a_number_of_loops_for_all_its_tokens(
    make_looplm: MakeCheckpoint, make_package: MakePackage, tmp_path: Path
) -> None:
    checkpoint = Path(copytree(make_looplm(), tmp_path / "checkpoint"))
    write_tokenizer(checkpoint)
    package = make_package(checkpoint)
    loose = calibrated_on(SENTENCE * 30, checkpoint, package, tmp_path, "auto:9000%")
    assert (loose["criteria"], loose["most_loops"], loose["loops"]) == ("never", 1, 1.0)
    strict = calibrated_on(SENTENCE * 30, checkpoint, package, tmp_path, "auto:0pt")
    assert (strict["criteria"], strict["loops"]) == ("never", 4.0)
    assert "most_loops" not in strict


def test_a_model_whose_later_loops_make_it_worse_is_calibrated_to_fewer_and_runs_them(tmp_path: Path) -> None:
    text = EXAMPLES / "text-melt" / "held_out.txt"
    request = ["--checkpoint", str(EXAMPLES / "text-melt"), "--output", str(tmp_path / "package"), "--no-verify"]
    done = CliRunner().invoke(export_app, [*request, "--exit", "auto:0.5%", "--exit-text", str(text)])
    assert done.exit_code == 0, done.output
    manifest = Package.open(tmp_path / "package").manifest
    found = manifest.exit
    assert found["most_loops"] == 2
    assert found["loss"] <= 0.5
    assert found["loops"] < 2
    assert manifest.format_version == 5
    assert f"{found['criteria']}, with 2 loops at most, keeps 0.5%" in " ".join(done.output.split())
    runtime = Runtime.load(tmp_path / "package")
    answer = runtime.generate("Elizabeth had never", max_tokens=16, exit="auto")
    assert max(answer.depth) == 2
    assert answer == runtime.generate("Elizabeth had never", max_tokens=16, exit=found["criteria"], loops=2)


def run(loss: float, same: float, loops: float, items: int = 8) -> Run:
    """Items of ten tokens: their mean loss per token, the share that agrees with all loops, and mean loops."""
    agrees = round(10 * same)
    said = [tuple([0] * agrees + [1] * (10 - agrees))] * items
    tokens = np.full(items, 10)
    return Run(np.full(items, 10 * loss), said, np.full(items, round(10 * loops)), tokens)


def test_what_is_lost_is_perplexity_in_percent_or_points_of_tokens_or_of_whole_answers() -> None:
    full, early = run(1.0, 1.0, 4), run(1.1, 0.9, 2)
    assert lost(early, full, "%", whole=False).value == pytest.approx(100 * (np.exp(0.1) - 1))
    assert lost(early, full, "pt", whole=False).value == pytest.approx(10.0)
    assert lost(early, full, "pt", whole=True).value == pytest.approx(100.0)


class Graded:
    """A sample whose agreement grows, and whose loops grow, with the strictness of the margin; others lose all.

    ``fixed``: loss and agreement of some fixed depths; all others lose all. Counts its runs.
    """

    name, whole = "a graded sample", False

    def __init__(self, loops: int = 4, fixed: dict[int, tuple[float, float]] | None = None):
        self.loops, self.runs = loops, 0
        self.fixed = {loops: (1.0, 1.0), **(fixed or {})}

    def run(self, exits: str, most: int) -> Run:
        self.runs += 1
        if exits == "never":
            return run(*self.fixed.get(most, (9.0, 0.0)), most)
        criterion, _, value = exits.partition(":")
        if criterion != "margin" or most < self.loops:
            return run(9.0, 0.0, 1)
        return run(1.0, min(1.0, 0.5 + float(value)), 1 + 2 * float(value))


class Window:
    """A sample on which two loops are worse than one and than four, and some tokens with two better than all."""

    name, whole = "a window", False

    def run(self, exits: str, most: int) -> Run:
        criterion, _, value = exits.partition(":")
        if exits == "never":
            return run(1.0 if most == 4 else 1.2, 0.0, most)
        if criterion != "margin":
            return run(9.0, 0.0, 1)
        window = most == 2 and 0.2 < float(value) < 0.6
        return run(0.9 if window else 1.2, 0.0, 1 + (most - 1) * float(value))


def chosen(quality: str, share: float = 0.0, sample: Any = None, progress: Step = no_progress) -> dict[str, Any]:
    sample = sample or Graded()
    loops = getattr(sample, "loops", 4)
    manifest: Any = SimpleNamespace(
        loops=loops, vocab_size=50, has_exit_gate=True, untrained=(), cache_loops=None, exit={}
    )
    return calibrate(sample, manifest, ExitOptions(quality), share, progress)


def test_a_fixed_depth_that_keeps_the_quality_is_chosen_where_nothing_is_cheaper() -> None:
    found = chosen("auto:0.5%", share=10.0, sample=Graded(fixed={2: (0.9, 0.0)}))
    assert (found["criteria"], found["most_loops"], found["loops"]) == ("never", 2, 2.0)
    assert found["loss"] < 0
    assert chosen("auto:0.5%", share=10.0, sample=Graded(fixed={1: (1.0, 0.0)}))["most_loops"] == 1
    assert "most_loops" not in chosen("auto:0pt", share=10.0)


def test_fewer_loops_are_found_where_only_some_tokens_should_have_them() -> None:
    found = chosen("auto:0.5%", sample=Window())
    assert found["criteria"].startswith("margin:")
    assert found["most_loops"] == 2
    assert 1 < found["loops"] < 1.6


def test_progress_is_told_from_before_the_first_run_to_the_end() -> None:
    told: list[tuple[str, int, int]] = []
    chosen("auto:1pt", progress=lambda *step: told.append(step))
    assert told[0][2] == 0
    assert {(name, total) for name, total, _ in told} == {("calibrating the exit", sum(done for *_, done in told))}


def test_of_equal_loops_the_better_quality_wins() -> None:
    same, worse = (Setting("never", most, True, 2.0, loss, 2.0) for most, loss in ((2, -1.0), (3, 0.2)))
    assert same.better(worse)
    assert not worse.better(same)
    assert not same.better(Setting("never", 4, True, 1.9, 5.0, 1.9))


def test_a_model_of_many_loops_is_calibrated_in_few_runs() -> None:
    sample = Graded(loops=32)
    assert chosen("auto:1pt", sample=sample)["criteria"].startswith("margin:")
    assert sample.runs < 100
    assert (depths(4), depths(32)) == ([1, 2, 3, 4], [1, 2, 6, 13, 32])


def test_the_cheapest_threshold_that_keeps_the_quality_is_chosen() -> None:
    strict, loose = chosen("auto:1pt"), chosen("auto:30pt")
    assert strict["criteria"].startswith("margin:")
    assert strict["loss"] <= 1.0
    assert 1.0 < loose["loops"] < strict["loops"] < 4.0
    assert loose["loss"] <= 30.0


def test_a_head_that_costs_more_than_the_loops_that_it_saves_is_not_asked() -> None:
    assert chosen("auto:1pt", share=10.0)["criteria"] == "never"


def test_few_items_must_lose_less_because_a_standard_error_is_added() -> None:
    full = run(1.0, 1.0, 4, items=100)
    one_wrong = Run(full.loss, [(9,) * 10, *full.said[1:]], full.loops, full.tokens)
    loss = lost(one_wrong, full, "pt", whole=True)
    assert loss.value == pytest.approx(1.0)
    assert loss.sure == pytest.approx(2.0)
    assert lost(full, full, "pt", whole=True).sure == 0.0
