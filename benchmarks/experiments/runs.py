"""All runs to compare: name, required run, and `melt-train` file of each, in the order of training.

Two runs that are compared differ in what the row's name says and in nothing else. Every student of seed s is distilled
from teacher-s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Section = dict[str, Any]

SEEDS = (0, 1, 2)
DATA: Section = {"task": "addition", "digits": 7}
MODEL: Section = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "total_ut_steps": 4,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "embedding_std": 1.0,
}
MELT: Section = {"chunk_size": 8}
TEACHER: Section = {
    "steps": 2000,
    "batch_size": 96,
    "learning_rate": 3e-3,
    "optimizer": "muon",
    "matrix_learning_rate": 0.02,
    "schedule": "flat-cosine",
    "weight_decay": 0.05,  # at 0.01 weights and attention outputs grow, and distillation takes far longer
    "warmup_steps": 50,
    "entropy_weight": 0.1,
    "save_every": 100,
}
# Settings of both phases of every student.
STUDENT: Section = {
    "batch_size": 64,
    "learning_rate": 1e-3,
    "gate_learning_rate": 1e-2,
    "schedule": "cosine",
    "warmup_steps": 20,
    "chunk_sizes": [1, 2, 4, 8],
    "save_every": 50,
}
MAIN_STEPS = (300, 600)  # phase 1, phase 2
LONG_STEPS = (300, 1200)
DEPTHS_STEPS = (300, 900)
ROW_STEPS = (120, 120)  # phase 1, phase 2: the budget of all rows of both tables
ROW_SHARE = 0.6  # of phase 1's steps, after which alpha is 1


@dataclass(frozen=True)
class Run:
    """One run.

    - ``row``: what is compared, the same for all seeds.
    - ``stages``: the checkpoints to measure.
    - ``curves``: whether to measure loops, exit thresholds and chunk sizes too.
    """

    name: str
    row: str
    seed: int
    content: Section
    needs: str | None = None
    curves: bool = False

    @property
    def stages(self) -> list[str]:
        return [name for name in ("teacher", "phase1", "phase2") if "steps" in self.content.get(name, {})]

    @property
    def steps(self) -> int:
        return sum(self.content[stage]["steps"] for stage in self.stages)


@dataclass(frozen=True)
class Row:
    """A row of a table: its changes to ``melt``, to the phases, and to its teacher if it has one of its own."""

    name: str
    title: str
    melt: Section
    both: Section
    phase1: Section
    phase2: Section
    teacher: Section


def _row(name: str, title: str, **sections: Section) -> Row:
    return Row(name, title, *(sections.get(part, {}) for part in ("melt", "both", "phase1", "phase2", "teacher")))


EVERYTHING = _row("gate", "element-wise gate (everything)")
AGGREGATIONS = (
    EVERYTHING,
    _row("scalar-gate", "scalar gate", melt={"aggregation": "scalar_gate"}),
    _row("mean", "mean over the loops", melt={"aggregation": "mean"}),
    _row("ema-0.2", "EMA, new input weighs 0.2", melt={"aggregation": "ema", "ema_weight": 0.2}),
    _row("ema-0.8", "EMA, new input weighs 0.8", melt={"aggregation": "ema", "ema_weight": 0.8}),
    _row("last", "last loop only", melt={"aggregation": "last"}),
)
LEFT_OUT = (
    EVERYTHING,
    _row("no-chunk-wise", "no chunk-wise training", both={"chunk_wise": False}),
    _row("no-interpolation", "no interpolation", phase1={"interpolation": "none"}),
    _row("no-alignment", "no attention alignment", phase2={"attention_weight": 0.0}),
    _row("alignment-0.01", "attention alignment weighs 0.01, not 0.1", phase2={"attention_weight": 0.01}),
    _row("last-loop-logits", "distillation on the last loop only", both={"distill": "last"}),
)
ROWS = tuple({row.name: row for row in (*AGGREGATIONS, *LEFT_OUT)}.values())

MAIN = _row("main", "MELT")
LONG = _row("main-long", "MELT, phase 2 twice as long")
# As long, with the lessons of the ablations: another weight of the alignment, and another optimiser.
TUNED = _row(
    "main-tuned",
    "MELT, also Muon and alignment at 0.02",
    both={"optimizer": "muon", "matrix_learning_rate": 1e-2},
    phase1={"interpolation_share": 0.6},
    phase2={"attention_weight": 0.02},
)
BUDGETS = (MAIN, LONG, TUNED)
# Beyond the paper: every loop learns from the teacher's last one; chunks leave after random numbers of loops, and the
# exit gate learns when leaving does no harm.
LAST: Section = {"teacher_loop": "last"}
ADAPTIVE: Section = {**LAST, "random_depth": 0.5, "exit_weight": 1.0}
DEPTHS = (
    _row("depths", "every depth useful", phase2=ADAPTIVE),
    _row("depths-last", "only distilled from the teacher's last loop", phase2=LAST),
)
# Useful at every depth, from the teacher on: a high entropy weight keeps its exit distribution even, so that early
# loops are trained too. The student also sees the whole prompt as one chunk.
EVEN = _row(
    "even",
    "every depth useful, from the teacher on",
    melt={"chunk_size": 16},
    both={"chunk_sizes": [1, 2, 4, 8, 16], "optimizer": "muon", "matrix_learning_rate": 1e-2},
    phase1={"interpolation_share": 0.6},
    phase2={"attention_weight": 0.02, **ADAPTIVE},
    teacher={"entropy_weight": 1.0},
)
EVEN_STEPS = (300, 1200)


def all_runs(root: Path, quick: bool = False) -> list[Run]:
    """Return every run, in the order of training, writing below ``root``.

    ``quick`` checks that everything works in minutes.
    """
    make = _Maker(root, quick)
    depths, last = DEPTHS
    first, *others = SEEDS
    runs = [make.teacher(seed) for seed in SEEDS]
    runs += [make.main(MAIN, first), make.depths(depths, first), *(make.main(MAIN, seed) for seed in others)]
    runs += [make.even_teacher(first), make.even(first)]
    runs += [make.ablation(row, seed) for seed in SEEDS for row in ROWS]
    runs += [make.main(row, seed) for row in (LONG, TUNED) for seed in SEEDS]
    runs += [make.depths(last, first), *(make.depths(depths, seed) for seed in others)]
    for seed in others:
        runs += [make.even_teacher(seed), make.even(seed)]
    return runs


class _Maker:
    def __init__(self, root: Path, quick: bool):
        self.root, self.quick = root, quick
        self.steps: Callable[[int], int] = (lambda steps: max(2, steps // 100)) if quick else (lambda steps: steps)

    def teacher(self, seed: int) -> Run:
        return self._teacher("teacher", seed, {})

    def even_teacher(self, seed: int) -> Run:
        return self._teacher("teacher-even", seed, EVEN.teacher)

    def main(self, row: Row, seed: int) -> Run:
        steps = MAIN_STEPS if row is MAIN else LONG_STEPS
        return self._student(f"{row.name}-{seed}", row, seed, steps, 1.0, curves=True)

    def depths(self, row: Row, seed: int) -> Run:
        return self._student(f"{row.name}-{seed}", row, seed, DEPTHS_STEPS, 1.0, curves=True)

    def even(self, seed: int) -> Run:
        return self._student(f"even-{seed}", EVEN, seed, EVEN_STEPS, 1.0, curves=True, teacher="teacher-even")

    def ablation(self, row: Row, seed: int) -> Run:
        return self._student(f"{row.name}-{seed}", row, seed, ROW_STEPS, ROW_SHARE, curves=False)

    def _teacher(self, row: str, seed: int, changed: Section) -> Run:
        name = f"{row}-{seed}"
        content = {**self._head(name, seed), "model": MODEL}
        content["teacher"] = {**TEACHER, "steps": self.steps(TEACHER["steps"]), **changed}
        return Run(name, row, seed, content, curves=True)

    def _student(
        self,
        name: str,
        row: Row,
        seed: int,
        steps: tuple[int, int],
        share: float,
        *,
        curves: bool,
        teacher: str = "teacher",
    ) -> Run:
        phase1, phase2 = (self.steps(count) for count in steps)
        content = {
            **self._head(name, seed),
            "melt": {**MELT, **row.melt},
            "teacher": {"checkpoint": str(self.root / f"{teacher}-{seed}" / "teacher")},
            "phase1": {"steps": phase1, **STUDENT, "interpolation_share": share, **row.both, **row.phase1},
            "phase2": {"steps": phase2, **STUDENT, "attention_weight": 0.1, **row.both, **row.phase2},
        }
        return Run(name, row.name, seed, content, needs=f"{teacher}-{seed}", curves=curves)

    def _head(self, name: str, seed: int) -> Section:
        data = {**DATA, "digits": 2} if self.quick else DATA
        return {"output": str(self.root / name), "seed": seed, "threads": 1, "data": data}
