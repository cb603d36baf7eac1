"""Makes the best finished run the repository's demo checkpoint, with its model card and the demo's problems.

    python benchmarks/experiments/ship.py [--name NAME]

The best of the runs within the paper's distance of their teacher at full depth is the one with the most problems with
long carries right, on average over 1 to all trained loops.
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from distance import PAPER_DISTANCE
from measure import problems
from melt_models.atomic import new_directory
from melt_models.training.tasks import Example, Task, make_task
from results import KINDS
from run import REPOSITORY, directory, result_of
from runs import MODEL, Run, all_runs
from shared import table

PROBLEMS = 200  # of the demo
LOOPS = MODEL["total_ut_steps"]
CARD = Path(__file__).with_name("card.md")
EXAMPLES = REPOSITORY / "examples"
CALIBRATION = EXAMPLES / "addition_calibration.jsonl"
Figures = dict[str, Any]


def at(points: list[Figures], **setting: float) -> Figures:
    """Return the point of a curve with this setting."""
    ((name, value),) = setting.items()
    return next(point for point in points if point[name] == value)


def right(result: Figures) -> list[float]:
    """Return the share of problems with long carries right at 1, 2, ... LOOPS loops."""
    return [at(result["by_loops"], num_loops=loops)["long"] for loops in range(1, LOOPS + 1)]


def rank(result: Figures, teacher: Figures) -> tuple[bool, float]:
    """Return a key to sort results by; the best is the largest."""
    near = 100 * (right(teacher)[-1] - right(result)[-1]) <= PAPER_DISTANCE
    return near, statistics.fmean(right(result))


def shares(points: list[Figures], setting: str, title: str) -> str:
    """Format a curve as a Markdown table: the setting, accuracy on both kinds of problems, loops per token."""
    rows = [[f"{p[setting]:g}", *(f"{p[kind]:.1%}" for kind in KINDS), f"{p['loops']:.2f}"] for p in points]
    return table([title, *KINDS.values(), "loops per token"], rows)


def card(run: Run, teacher: Run, result: Figures) -> str:
    """Write the model card."""
    steps = {stage: run.content[stage]["steps"] for stage in run.stages}
    example = problems(run.content["data"], 1)[0]["long"][0]
    recipe = {"data": run.content["data"], "model": teacher.content["model"], "melt": run.content["melt"]}
    recipe |= {"teacher": teacher.content["teacher"], **{stage: run.content[stage] for stage in run.stages}}
    plain = json.loads(json.dumps(recipe))  # copies shared lists, which YAML would write as references
    minutes = sum(stage["seconds"] for stage in result["stages"].values()) / 60
    return CARD.read_text(encoding="utf-8").format(
        prompt=example.prompt,
        answer=example.answer,
        digits=run.content["data"]["digits"],
        loops=LOOPS,
        parameters=f"{result['parameters']:,}",
        chunk=run.content["melt"]["chunk_size"],
        name=run.name,
        teacher=teacher.name,
        teacher_steps=teacher.content["teacher"]["steps"],
        phase1_steps=steps["phase1"],
        phase2_steps=steps["phase2"],
        minutes=f"{minutes:.0f}",
        torch=result["versions"]["torch"],
        recipe=yaml.safe_dump(plain, sort_keys=False).strip(),
        count=result["problems"],
        by_loops=shares(result["by_loops"], "num_loops", "loops"),
        by_threshold=shares(result["by_threshold"], "exit_threshold", "exit threshold"),
        by_chunk=shares(result["by_chunk"], "chunk_size", "chunk size of the prompt"),
    )


def calibration_problems(task: Task, shown: list[Example]) -> list[Example]:
    """Return other held-out problems of the kind that the demo shows: what its early exit is calibrated on."""
    return [example for example in task.test_set(2 * PROBLEMS, seed=1, hard=True) if example not in shown][:PROBLEMS]


def write_problems(examples: list[Example], file: Path) -> None:
    lines = [json.dumps({"prompt": example.prompt, "answer": example.answer}) + "\n" for example in examples]
    file.write_text("".join(lines), encoding="utf-8")


def main(
    name: Annotated[str | None, typer.Option(help="Take this run instead of the best.")] = None,
    root: Annotated[Path, typer.Option(help="Where runs are written.")] = Path("build/experiments"),
) -> None:
    """Replace examples/addition-melt and examples/addition_problems.jsonl."""
    runs = {run.name: run for run in all_runs(root)}
    results = {name: result for name, run in runs.items() if (result := result_of(run)) is not None}
    ranks = {
        key: rank(results[key], results[str(run.needs)])
        for key, run in runs.items()
        if run.curves and run.needs in results and key in results
    }
    if not ranks or (name is not None and name not in ranks):
        raise typer.BadParameter(f"{name or 'no run'} has been trained and measured; there are {sorted(ranks)}")
    best = name or max(ranks, key=lambda key: ranks[key])
    run = runs[best]
    with new_directory(EXAMPLES / "addition-melt", force=True) as build:
        shutil.copytree(directory(run) / "phase2", build, dirs_exist_ok=True)
        (build / "README.md").write_text(card(run, runs[str(run.needs)], results[best]), encoding="utf-8")
    examples = problems(run.content["data"], PROBLEMS)[0]["long"]
    write_problems(examples, EXAMPLES / "addition_problems.jsonl")
    write_problems(calibration_problems(make_task(**run.content["data"]), examples), CALIBRATION)
    typer.echo(f"{best} is the demo checkpoint; long carries right at 1 to {LOOPS} loops, best run first:")
    for key in sorted(ranks, key=lambda key: ranks[key], reverse=True):
        typer.echo(f"  {key}: {', '.join(f'{share:.1%}' for share in right(results[key]))}")


if __name__ == "__main__":
    typer.run(main)
