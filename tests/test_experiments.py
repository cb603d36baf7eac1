"""The experiments: every compared run differs in one thing, runs resume, and documents say what the figures say."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from melt_models.training import stages
from melt_models.training.config import read_run
from rich.console import Console

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "experiments"
sys.path.insert(0, str(FOLDER))
pytest.importorskip("matplotlib")

import document  # noqa: E402
import measure  # noqa: E402
import run as runner  # noqa: E402
from results import Results, spread  # noqa: E402
from runs import AGGREGATIONS, LEFT_OUT, ROWS, SEEDS, Run, all_runs  # noqa: E402

LOOPS, THRESHOLDS, CHUNKS = range(1, 9), (0.5, 0.9, 1.0), (1, 8, 16)


def measured(run: Run, right: float) -> dict[str, Any]:
    """What measure.py writes of a run, made up."""
    score = {"even": right, "long": right, "loops": 4.0}
    losses = [
        {"step": s, "loss_1": 1 / s, "kl": 1 / s, "kl_last": 1 / s, "attention": 1 / s, "alpha": s / 9} for s in (1, 9)
    ]
    figures: dict[str, Any] = {
        "name": run.name,
        "row": run.row,
        "seed": run.seed,
        "problems": 500,
        "parameters": 63681,
        "cache_bytes_a_token": 2048 if run.row == "teacher" else 512,
        "stages": {stage: {**score, "seconds": 60, "losses": losses} for stage in run.stages},
        "content": run.content,
        "measuring_seconds": 1,
    }
    if run.curves or run.row == "teacher":
        figures["by_loops"] = [{**score, "num_loops": loops, "even": right if loops > 1 else 0.02} for loops in LOOPS]
        figures["by_threshold"] = [{**score, "exit_threshold": x, "loops": 1 + x} for x in THRESHOLDS]
        figures["by_chunk"] = [{**score, "chunk_size": size} for size in CHUNKS]
    return figures


def documented(directory: Path, right: dict[str, float], *, without: tuple[str, ...] = ()) -> str:
    """experiments.md of made-up results: ``right`` by run or row (0.9 if absent), and without some runs."""
    runs = all_runs(directory)
    names = {run.name for run in runs if any(re.fullmatch(pattern, run.name) for pattern in without)}
    content = {
        "date": "2030-01-01",
        "quick": False,
        "machine": {"cpu": "a CPU", "cores": 2, "memory_bytes": 1e9, "system": "Linux"},
        "versions": {"python": "3.11"},
        "runs": [measured(run, right.get(run.name, right.get(run.row, 0.9))) for run in runs if run.name not in names],
        "missing": [run.name for run in runs if run.name in names],
    }
    (directory / "experiments.json").write_text(json.dumps(content))
    return document.markdown(Results.read(directory / "experiments.json"))


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """A run's file with one key a setting."""
    if not isinstance(section, dict):
        return {prefix: section}
    return {k: v for name, value in section.items() for k, v in flat(value, f"{prefix}.{name}").items()}


def test_a_row_differs_from_everything_in_what_its_name_says_and_in_nothing_else() -> None:
    runs = {run.name: flat(run.content) for run in all_runs(Path("there"))}
    differing = {}
    for row in ROWS:
        base, mine = runs["gate-1"], runs[f"{row.name}-1"]
        different = {key for key in {*base, *mine} if base.get(key) != mine.get(key)}
        differing[row.name] = different - {".output"}
    assert differing == {
        "gate": set(),
        "scalar-gate": {".melt.aggregation"},
        "mean": {".melt.aggregation"},
        "ema-0.2": {".melt.aggregation", ".melt.ema_weight"},
        "ema-0.8": {".melt.aggregation", ".melt.ema_weight"},
        "last": {".melt.aggregation"},
        "no-chunk-wise": {".phase1.chunk_wise", ".phase2.chunk_wise"},
        "no-interpolation": {".phase1.interpolation"},
        "no-alignment": {".phase2.attention_weight"},
        "alignment-0.01": {".phase2.attention_weight"},
        "last-loop-logits": {".phase1.distill", ".phase2.distill"},
    }


def test_melt_train_accepts_the_file_of_every_run(tmp_path: Path) -> None:
    for run in all_runs(tmp_path):
        (tmp_path / (run.needs or run.name) / "teacher").mkdir(parents=True, exist_ok=True)
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(run.content))
        assert read_run(file).stages() == run.stages


def test_the_example_is_the_shipped_checkpoints_recipe() -> None:
    example = yaml.safe_load((FOLDER.parent.parent / "examples" / "addition.yaml").read_text(encoding="utf-8"))
    runs = {run.name: run.content for run in all_runs(Path("there"))}
    teacher, main = runs["teacher-even-0"], runs["even-0"]
    assert {**example["phase1"], "interpolation": "linear"} == {**main["phase1"], "interpolation": "linear"}
    assert example["phase2"] == main["phase2"]
    assert {key: example[key] for key in ("model", "teacher")} == {key: teacher[key] for key in ("model", "teacher")}
    assert {key: example[key] for key in ("data", "seed", "melt")} == {
        key: main[key] for key in ("data", "seed", "melt")
    }


class FakeWork:
    """Instead of training: fails where it is told to."""

    def __init__(self, *failing: str):
        self.failing, self.did, self.stopped = failing, list[str](), False

    def __call__(self, run: Run) -> str | None:
        self.did.append(run.name)
        return f"{run.name} failed" if run.name in self.failing else None

    def stop(self) -> None:
        self.stopped = True


def scheduled(work: FakeWork, *chosen: str) -> dict[str, str | None]:
    runs = [run for run in all_runs(Path("there")) if run.name in chosen or not chosen]
    board = runner.Board(runs, 0)
    board.console = Console(quiet=True)
    return {run.name: problem for run, problem in runner.schedule(runs, set(), work, 2, board)}  # type: ignore[arg-type]


def test_a_student_waits_for_its_teacher() -> None:
    work = FakeWork()
    assert set(scheduled(work).values()) == {None}
    for run in all_runs(Path("there")):
        assert run.needs is None or work.did.index(run.needs) < work.did.index(run.name)


def test_a_run_that_fails_takes_only_those_along_that_need_it() -> None:
    work = FakeWork("teacher-1", "mean-0")
    problems = {name for name, problem in scheduled(work).items() if problem}
    assert problems == {"mean-0"} | {
        run.name for run in all_runs(Path("there")) if "teacher-1" in (run.name, run.needs)
    }
    assert "main-1" not in work.did
    assert work.stopped


def test_a_run_whose_teacher_was_not_chosen_is_reported() -> None:
    assert "teacher-2, which it needs, was not chosen" in str(scheduled(FakeWork(), "main-2")["main-2"])


def test_the_document_has_every_table_and_every_plot(tmp_path: Path) -> None:
    text = documented(tmp_path, {})
    for row in (*AGGREGATIONS, *LEFT_OUT):
        assert f"| {row.title} | 90.0 ± 0.0 |" in text
        assert f"| {row.title} | 90.0, 90.0, 90.0 |" in text
    assert "| loops | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |" in text
    assert "| 0.9 | MELT | 1.90 | 90.0 | 90.0 |" in text
    assert "| tokens per chunk | 1 | 8 | 16 |" in text
    assert "Not measured yet" not in text
    assert "Not finished" not in text
    document.write_documents(tmp_path)
    assert (tmp_path / "experiments.md").read_text(encoding="utf-8") == text
    for name in re.findall(r"\]\((\S+\.png)\)", text):
        assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize(("melt", "said"), [(0.9, "within the 2.4 points"), (0.85, "MORE than the 2.4 points")])
def test_the_distance_to_the_teacher_is_computed(tmp_path: Path, melt: float, said: str) -> None:
    assert said in documented(tmp_path, {"main": melt, "teacher": 0.92})


def test_the_distance_of_each_kind_of_problem_has_a_judgement_of_its_own() -> None:
    text = (FOLDER.parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"- \*\*MELT, phase 2 twice as long\*\*.*", text)
    assert "1.0 points below on problems drawn evenly, within the 2.4 points" in line
    assert "2.7 on long carries, MORE than the 2.4 points" in line


def test_seeds_that_agree_in_sign_alone_show_nothing(tmp_path: Path) -> None:
    text = documented(tmp_path, {"no-interpolation-0": 0.0, "no-interpolation-1": 0.0, "no-interpolation-2": 0.822})
    (line,) = re.findall(r"- \*\*no interpolation\*\*.*", text)
    # gaps of 90, 90, 7.8 points: mean 62.6, standard error 27.4, times 4.303
    says = "everything is better on every seed, but NOT shown to be (95% interval -55.3 to +180.5)"
    assert f"after phase 2 +62.6 (+90.0, +90.0, +7.8), {says}" in line
    assert "these seeds agree, too few to show it (after phase 2)" in line
    assert "As in the paper" not in line


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ((0.35, 0.3, 0.25), "(+55.0, +60.0, +65.0), everything is better. As in the paper"),
        ((0.95, 0.3, 0.3), "the seeds do not agree"),
        ((0.895, 0.905, 0.9), "no difference"),
    ],
)
def test_a_difference_is_shown_where_its_confidence_interval_excludes_none(
    tmp_path: Path, last: tuple[float, ...], said: str
) -> None:
    (line,) = re.findall(
        r"- \*\*last loop only\*\*.*", documented(tmp_path, {f"last-{seed}": x for seed, x in enumerate(last)})
    )
    assert said in line


def test_a_row_of_fewer_seeds_says_so_wherever_it_stands(tmp_path: Path) -> None:
    text = documented(tmp_path, {}, without=("even-2",))
    for title, seeds in (("only distilled from the teacher's last loop", "1 seed"), ("from the teacher on", "2 seeds")):
        assert len(re.findall(rf"{title} \({seeds} of 3\)", text)) >= 7
        assert f"{title} |" not in text


def test_a_row_that_comes_out_otherwise_than_in_the_paper_is_said_to(tmp_path: Path) -> None:
    text = documented(tmp_path, {"gate": 0.8, "mean": 0.5, "scalar-gate": 0.805, "last": 0.9})
    (mean,) = re.findall(r"- \*\*mean over the loops\*\*.*", text)
    (scalar,) = re.findall(r"- \*\*scalar gate\*\*.*", text)
    (last,) = re.findall(r"- \*\*last loop only\*\*.*", text)
    assert "+30.0 (+30.0, +30.0, +30.0), everything is better;" in mean
    assert "As in the paper" in mean
    assert "no difference" in scalar
    assert "NOT shown by these runs" in scalar
    assert "everything is WORSE." in last
    assert "NOT shown by these runs" in last


def test_missing_runs_are_named_and_their_rows_say_how_many_seeds_they_have(tmp_path: Path) -> None:
    text = documented(tmp_path, {}, without=("mean-2", "last-.*", "depths-.*"))
    assert "Not finished yet: " in text
    assert "mean-2" in text
    assert f"| mean over the loops (2 seeds of {len(SEEDS)}) |" in text
    assert "| last loop only |" not in text


def test_without_any_run_there_is_a_document_that_says_so(tmp_path: Path) -> None:
    text = documented(tmp_path, {}, without=(".*",))
    document.write_documents(tmp_path)
    assert text.count("Not measured yet") == 7
    assert not list(tmp_path.glob("*.png"))


def test_the_document_in_the_repository_is_written_from_its_figures() -> None:
    docs = FOLDER.parent.parent / "docs"
    text = document.markdown(Results.read(docs / "experiments.json"), document.read(docs / "text.json"))
    assert text == (docs / "experiments.md").read_text(encoding="utf-8")


def test_the_section_on_text_says_which_checkpoint_was_not_measured(tmp_path: Path) -> None:
    docs = FOLDER.parent.parent / "docs"
    content = document.read(docs / "text.json")
    assert content is not None
    content["measured"] = {"main-0/gate": {"decoded, 2 loops": 37.03}}
    text = document.markdown(Results.read(docs / "experiments.json"), content)
    assert "| 2 | – | – | – | 37.0 | – | – |" in text
    assert "## On text" not in document.markdown(Results.read(docs / "experiments.json"))


def test_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert spread([4.0]) == "4.0"
    assert spread([]) == "–"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the quick version, trained and measured in this process, and documented."""
    root = tmp_path_factory.mktemp("quick")
    runs = all_runs(root, quick=True)
    for run in runs:
        if run.name in ("teacher-0", "gate-0"):
            file = root / f"{run.name}.yaml"
            file.write_text(yaml.safe_dump(run.content))
            stages.run(read_run(file), run.stages)
            measure.main(run.name, root, quick=True)
    assert runner.record(runs, root, quick=True) is None
    return root


def test_the_quick_version_trains_measures_and_documents(quick: Path) -> None:
    results = Results.read(quick / "experiments.json")
    assert [run["name"] for run in results.runs] == ["teacher-0", "gate-0"]
    teacher, gate = results.runs
    assert teacher["cache_bytes_a_token"] == 4 * gate["cache_bytes_a_token"]
    assert [point["num_loops"] for point in teacher["by_loops"]] == list(LOOPS)
    assert set(gate["stages"]) == {"phase1", "phase2"}
    assert "these figures only show that the program works" in (quick / "experiments.md").read_text().lower()


def test_what_is_finished_is_not_done_again(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.Worker, "__call__", lambda *_: pytest.fail("a finished run was done again"))
    monkeypatch.setattr(runner, "record", lambda *_: None)
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    runner.main(only="teacher-0,gate-0", quick=True, root=quick, docs=quick)


def test_a_result_of_other_settings_does_not_count(quick: Path) -> None:
    (gate,) = (run for run in all_runs(quick, quick=True) if run.name == "gate-0")
    assert runner.result_of(gate) is not None
    gate.content["phase2"]["steps"] += 1
    assert runner.result_of(gate) is None


def test_a_worker_tells_where_to_read_why_a_run_failed(tmp_path: Path) -> None:
    (run,) = (run for run in all_runs(tmp_path, quick=True) if run.name == "teacher-0")
    run.content["model"] = {"total_ut_steps": 0}
    with (tmp_path / "lock").open("w") as lock:
        problem = runner.Worker(True, lock.fileno())(run)
    assert "teacher-0" in str(problem)
    assert "total_ut_steps is 0" in (tmp_path / "teacher-0" / "log.txt").read_text()


def test_two_commands_do_not_write_the_same_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = runner.lock_of(tmp_path)
    with pytest.raises(runner.typer.Exit):
        runner.lock_of(tmp_path)
    assert "is in use" in capsys.readouterr().err
    os.close(held)
    os.close(runner.lock_of(tmp_path))
