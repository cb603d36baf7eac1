"""Writes docs/experiments.md and its plots from docs/experiments.json; none of them is edited by hand.

    python benchmarks/experiments/document.py [--docs docs]

Sentences that compare are computed from the figures. Explanations, which no program can find, are in notes.py.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer
import yaml
from distance import teacher_part
from plots import draw_all
from results import KINDS, Results, each, spread
from runs import AGGREGATIONS, DEPTHS, EVEN, EVERYTHING, LEFT_OUT, TEACHER, Row
from sections import PAPER, Section, few, picture, plural, section
from shared import table

EQUAL = 1.0  # points; means closer than this count as equal
# The paper's figures for the rows of both tables.
PAPER_AGGREGATIONS = {"gate": "77.7", "scalar-gate": "66.9", "mean": "68.8", "ema-0.2": "68.6", "last": "69.7"}
PAPER_LEFT_OUT = {
    "no-chunk-wise": "0.0 on every set",
    "no-interpolation": "about -10 points",
    "no-alignment": "-2 to -3 points",
}
PHASES = {"phase1": "after phase 1", "phase2": "after phase 2"}
STUDENTS = {"main": "MELT", **{row.name: row.title for row in (*DEPTHS, EVEN)}}


def top(results: Results) -> str:
    """Write the introduction, and name missing runs."""
    runs = results.runs
    missing = results.content["missing"]
    quick = "**These figures only show that the program works: a hundredth of the steps.**\n\n"
    problems = runs[0]["problems"] if runs else 0
    return (
        "# Experiments\n\n"
        "Written by `python benchmarks/experiments/document.py` from `docs/experiments.json`; do not edit.\n\n"
        + quick
        * results.content["quick"]
        + "The method of the MELT paper at a size that two CPU cores can train: a LoopLM teacher of one layer and four "
        "loops learns to add two seven-digit numbers, most significant digit first, so that a carry may have to pass "
        "through all columns before the first digit is written. MELT is distilled from it in two phases. Everything "
        f"is exact match by greedy decoding, one token at a time, on {problems} problems that training never draws, "
        "and on as many with long carries (a third of the columns adds up to 9). Each seed has its own teacher; "
        "± is the sample standard deviation over seeds.\n"
        + (f"\nNot finished yet: {', '.join(missing)}.\n" if missing else "")
    )


def ablations_part(results: Results) -> Section:
    """Write what both tables have in common: the budget and the plot."""
    runs = results.row(EVERYTHING.name)
    if not runs:
        return section("What matters: two ablations", "Not measured yet.\n")
    phases = [runs[0]["content"][phase] for phase in PHASES]
    return section(
        "What matters: two ablations",
        f"All rows have the same budget, {phases[0]['steps']} steps of phase 1 (alpha is 1 after "
        f"{phases[0]['interpolation_share']:.0%} of them) and {phases[1]['steps']} of phase 2, "
        f"{phases[0]['batch_size']} problems per step: less than the model above, so that rows can differ. Learning "
        "rates are the same too; they were chosen for the element-wise gate and for no other row. The last column of "
        f"each table is the paper's ({PAPER}), measured on a model of 1.6B parameters and competition maths: compare "
        "the order and the signs, not the values.\n",
        picture("experiments_ablations.png", "Both tables as a plot: every seed, and the mean."),
    )


def ablation_part(
    results: Results, title: str, rows: tuple[Row, ...], paper: dict[str, str], column: str, compared: str, note: str
) -> Section:
    """Write one of the two tables: means, each seed's result, and how each row compares with everything.

    ``paper``: its figures by row, for the column ``column``. ``compared``: the phase to compare with these figures.
    """
    found = [row for row in rows if results.row(row.name)]
    if not found:
        return section(title, "Not measured yet.\n", level=3)
    columns = [(stage, kind) for stage in PHASES for kind in KINDS]
    head = ["", *(f"{PHASES[stage]}, {KINDS[kind]}" for stage, kind in columns)]
    values = {row.name: [list(results.accuracies(row.name, *c).values()) for c in columns] for row in found}
    mean_rows = [
        [row.title + few(results, row), *map(spread, values[row.name]), paper.get(row.name, "–")] for row in found
    ]
    sentences = [
        comparison(results, row, compared if row.name in paper else None) for row in found if row is not EVERYTHING
    ]
    return section(
        title,
        table([*head, column], mean_rows),
        "% right, mean over seeds ± standard deviation.\n",
        "<details><summary>Every seed</summary>\n\n"
        + table(head, [[row.title, *map(each, values[row.name])] for row in found])
        + "\n</details>\n",
        "Against everything: mean over seeds, and each seed, of the points by which everything is better on problems "
        f"drawn evenly; a mean below {EQUAL:g} point counts as no difference.\n\n"
        + "".join(f"- {sentence}\n" for sentence in sentences),
        note=note,
        level=3,
    )


def comparison(results: Results, row: Row, compared: str | None) -> str:
    """Compare a row with everything after both phases, and with the paper after phase ``compared``."""
    parts, as_in_paper = [], False
    for stage, words in PHASES.items():
        gaps = list(results.differences(row.name, EVERYTHING.name, stage, "even").values())
        if not gaps:
            return f"**{row.title}**: no seed to compare."
        verdict = "the seeds do not agree"
        if abs(statistics.fmean(gaps)) < EQUAL:
            verdict = "no difference"
        elif min(gaps) > 0 or max(gaps) < 0:
            verdict = f"everything is {'better' if min(gaps) > 0 else 'WORSE'} on every seed"
        as_in_paper |= stage == compared and "better" in verdict
        parts.append(f"{words} {statistics.fmean(gaps):+.1f} ({each(gaps, '{:+.1f}'.format)}), {verdict}")
    said = "; ".join(parts)
    if compared:
        said += ". As in the paper" if as_in_paper else ". In the paper everything is better: NOT shown by these runs"
        said += f" ({PHASES[compared]})"
    return f"**{row.title}**: {said}."


def depth_part(results: Results) -> Section:
    """Write the section on loops and exit thresholds."""
    rows = {name: title for name, title in STUDENTS.items() if results.row(name)}
    if not rows:
        return section("Depth at inference", "Not measured yet.\n")
    names = {"teacher": "teacher", **rows}
    if results.row("teacher-even"):
        names["teacher-even"] = "the even teacher"
    loops = [point.setting for point in results.curve(next(iter(rows)), "by_loops", "even")]
    by_loops = [
        [f"{title}{'' if kind == 'even' else ', long carries'}"]
        + [f"{point.mean:.1f}" for point in results.curve(name, "by_loops", kind)]
        for name, title in names.items()
        for kind in KINDS
    ]
    thresholds = [
        [
            f"{point.setting:g}" if not index else "",
            title,
            f"{point.loops:.2f}",
            f"{point.mean:.1f}",
            f"{long.mean:.1f}",
        ]
        for at in range(len(results.curve(next(iter(rows)), "by_threshold", "even")))
        for index, (name, title) in enumerate(rows.items())
        for point, long in [(results.curve(name, "by_threshold", k)[at] for k in ("even", "long"))]
    ]
    said = [useful(results, name, title) for name, title in rows.items()]
    return section(
        "Depth at inference",
        picture("experiments_depth.png", "Left: accuracy against loops. Right: accuracy against mean loops per token."),
        "How many loops each token gets, from 1 to twice as many as trained (% right, mean over seeds: "
        + ", ".join(f"{title} {len(results.row(name))}" for name, title in names.items())
        + "; the teacher is read at the loop, its further loops are loops that it was not trained for):\n",
        table(["loops", *(f"{loop:g}" for loop in loops)], by_loops),
        "A token leaves as soon as the cumulative probability of its exit gate reaches the threshold; 1 runs every "
        "loop. The mean is over written tokens of both kinds of problems:\n",
        table(["exit threshold", "", "mean loops per token", "drawn evenly", "long carries"], thresholds),
        "".join(f"- {sentence}\n" for sentence in said),
        "*MELT* is distilled loop by loop from the same loop of the teacher, as in the paper. "
        f"*{DEPTHS[0].title}*: in phase 2, which is longer, every loop learns from the teacher's last loop, half of "
        "the steps let each chunk leave after a random number of loops, and the exit gate is trained to say whether "
        f"leaving would change the answer. *{DEPTHS[1].title}*: only the first of the three, equally long. "
        f"*{EVEN.title}*: its teacher's entropy weight is {EVEN.teacher['entropy_weight']:g} instead of "
        f"{TEACHER['entropy_weight']:g}, which keeps the exit distribution even and so trains the early loops; the "
        "student has all three of the above, Muon, a smaller alignment weight and a longer phase 2.\n",
        note="depth",
    )


def useful(results: Results, name: str, title: str) -> str:
    """Say how deep a row must run: its cheapest threshold that costs at most a point, and its accuracy at few loops."""
    full = results.curve(name, "by_threshold", "even")[-1]
    cheap = min(
        (p for p in results.curve(name, "by_threshold", "even") if p.mean >= full.mean - 1), key=lambda p: p.loops
    )
    loops = {point.setting: point.mean for point in results.curve(name, "by_loops", "even")}
    beyond = [loops[loop] for loop in loops if loop > 4]
    return (
        f"**{title}**: {loops[1]:.1f}% with one loop, {loops[2]:.1f}% with two, {loops[4]:.1f}% with four, "
        f"{min(beyond):.1f} to {max(beyond):.1f}% with five to eight. Within one point of the {full.mean:.1f}% of all "
        f"loops, the fewest loops that a threshold gives are {cheap.loops:.2f} per token "
        f"(threshold {cheap.setting:g}, {cheap.mean:.1f}%)."
    )


def chunk_part(results: Results) -> Section:
    """Write the section on chunk sizes at prefill."""
    rows = {name: title for name, title in STUDENTS.items() if results.row(name)}
    if not rows:
        return section("Chunk size at prefill", "Not measured yet.\n")
    sizes = [point.setting for point in results.curve(next(iter(rows)), "by_chunk", "even")]
    cells = [
        [f"{title}{'' if kind == 'even' else ', long carries'}"]
        + [f"{point.mean:.1f}" for point in results.curve(name, "by_chunk", kind)]
        for name, title in rows.items()
        for kind in KINDS
    ]
    content = results.row(next(iter(rows)))[0]["content"]
    prompt = 2 * content["data"]["digits"] + 2
    trained = content["phase2"]["chunk_sizes"]
    return section(
        "Chunk size at prefill",
        picture("experiments_chunks.png", "Accuracy against the chunk size in which the prompt is read."),
        table(["tokens per chunk", *(f"{size:g}" for size in sizes)], cells),
        f"% right, mean over seeds. The model's own chunk size is {content['melt']['chunk_size']}; training draws each "
        f"chunk's size from {', '.join(map(str, trained))} (*{EVEN.title}*: {EVEN.melt['chunk_size']}, and from "
        f"{', '.join(map(str, EVEN.both['chunk_sizes']))}). The prompt has {prompt} tokens, so {prompt} and everything "
        "above are the whole prompt in one chunk. Tokens of one chunk see each other's keys and values of the same "
        "loop, and those of earlier chunks as their last loop left them, so the chunk size changes what the model "
        "computes. Written tokens are always chunks of one.\n",
        note="chunks",
    )


def loss_part(results: Results) -> Section:
    """Write the section on the loss curves of seed 0."""
    if results.run("main-0") is None:
        return section("Losses", "Not measured yet.\n")
    return section(
        "Losses",
        picture("experiments_losses.png", "Losses of the teacher, of phase 1 with alpha, and of phase 2, seed 0."),
        "Seed 0. The teacher's cross-entropy of each loop; the divergence from the teacher (mean of all loops, and the "
        "last loop alone) while alpha goes from 0, the teacher's own keys and values, to 1, MELT's; then phase 2.\n",
    )


def repeat_part(results: Results) -> Section:
    """Write the section on how to repeat the experiments, and their time."""
    content, runs = results.content, results.runs
    seconds = sum(sum(s["seconds"] for s in run["stages"].values()) + run["measuring_seconds"] for run in runs)
    machine = content["machine"]
    shown = results.run("main-0")
    settings = ""
    if shown is not None:
        config = {key: value for key, value in shown["content"].items() if key not in ("output", "teacher")}
        teacher = results.run("teacher-0")
        if teacher is not None:
            config |= {"model": teacher["content"]["model"], "teacher": teacher["content"]["teacher"]}
        settings = (
            "<details><summary>Settings of teacher-0 and main-0</summary>\n\n```yaml\n"
            + yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=110)
            + "```\n\n</details>\n"
        )
    return section(
        "How to repeat it",
        "```console\n$ make experiments   # resumable: python benchmarks/experiments/run.py\n```\n",
        f"- {plural(len(runs), 'run')}, {seconds / 3600:.1f} hours of training and measuring in all, "
        "one thread each, several at a time\n"
        f"- Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.1f} GB of memory, "
        f"{machine['system']}; shared with other work at the time, so times are upper limits\n"
        f"- Date: {content['date']}\n"
        f"- Versions: {', '.join(f'{name} {number}' for name, number in content['versions'].items())}\n",
        "All settings are in `benchmarks/experiments/runs.py`, and each run's own beside its figures in "
        "`docs/experiments.json`. One model's whole story, teacher and both phases, is "
        "[`examples/addition.yaml`](../examples/addition.yaml).\n",
        settings,
    )


def markdown(results: Results) -> str:
    """Write docs/experiments.md."""
    parts = [
        top(results),
        teacher_part(results),
        ablations_part(results),
        ablation_part(
            results,
            "How a token's loops become one key and value in the cache",
            AGGREGATIONS,
            PAPER_AGGREGATIONS,
            "the paper: AMC23 pass@1 after phase 1",
            "phase1",
            "aggregations",
        ),
        ablation_part(
            results,
            "Leaving a part of the training out",
            LEFT_OUT,
            PAPER_LEFT_OUT,
            "the paper: what leaving it out changed",
            "phase2",
            "left_out",
        ),
        depth_part(results),
        chunk_part(results),
        loss_part(results),
        repeat_part(results),
    ]
    return "\n".join(parts)


def write_documents(docs: Path) -> None:
    """Rewrite experiments.md and the plots in ``docs`` from its experiments.json."""
    results = Results.read(docs / "experiments.json")
    draw_all(results, docs)
    (docs / "experiments.md").write_text(markdown(results), encoding="utf-8")


def main(
    docs: Annotated[Path, typer.Option(help="Directory of experiments.json; the results go there.")] = Path("docs"),
) -> None:
    """Write experiments.md and the plots from experiments.json (needs matplotlib)."""
    write_documents(docs)


if __name__ == "__main__":
    typer.run(main)
