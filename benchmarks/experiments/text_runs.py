"""The runs on text: a LoopLM teacher per seed, its MELT, and ablations. Sections are those of `melt-train`.

A size gives the model and the batches; everything else is the same on a GPU and on two CPU cores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Section = dict[str, Any]

SEEDS = (0, 1)
LOOPS = 4


@dataclass(frozen=True)
class Size:
    """``sequence`` tokens per sequence; ``batch`` sequences per step of a teacher or a MELT, ``row_batch`` of an
    ablation; ``chunk`` is the MELT's own chunk size and ``chunks`` what training draws from."""

    model: Section
    sequence: int
    batch: int
    row_batch: int
    chunk: int
    chunks: tuple[int, ...]


def _model(hidden: int, middle: int, layers: int, heads: int) -> Section:
    return {
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "total_ut_steps": LOOPS,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        # Embeddings are small because the head reads them too, and enter the first layer with a deviation of 1.
        "embedding_std": round(hidden**-0.5, 4),
        "embedding_scale": float(round(hidden**0.5)),
        "branch_scale": 0.3,  # leaves more of the embedding after several loops
    }


SIZES = {
    "gpu": Size(_model(384, 1024, 3, 6), 512, 32, 16, 128, (32, 128, 256)),
    "cpu": Size(_model(256, 704, 3, 4), 256, 16, 8, 64, (16, 64, 128)),
    "tiny": Size(_model(64, 192, 1, 2), 64, 4, 4, 16, (8, 16, 32)),
}

TEACHER: Section = {
    "steps": 3000,
    "learning_rate": 3e-3,
    "optimizer": "muon",
    "matrix_learning_rate": 0.02,
    "schedule": "flat-cosine",
    "weight_decay": 0.05,
    "warmup_steps": 30,
    "entropy_weight": 0.3,  # keeps the exit distribution even enough that early loops are trained
}
# How the tokens of every student and of its gate are cut into chunks, beside a size's chunks.
DECODING: Section = {"decoding_share": 0.5}
# Settings of both phases of every student.
STUDENT: Section = {
    "learning_rate": 1e-3,
    "optimizer": "muon",
    "matrix_learning_rate": 5e-3,
    "gate_learning_rate": 1e-2,
    "schedule": "cosine",
    "warmup_steps": 10,
}
PHASE1: Section = {"steps": 600, "interpolation_share": 0.6}
PHASE2: Section = {"steps": 1000, "attention_weight": 0.002}  # a sum over the width: 0.1 would outweigh the divergence
# What the shipped model has beyond the paper: every depth is useful.
ADAPTIVE: Section = {"teacher_loop": "last", "random_depth": 0.5, "exit_weight": 0.1}
GATE: Section = {"steps": 200, "learning_rate": 3e-2, "measured": "divergence", "least_gain": 0.2, "sharpness": 5}


@dataclass(frozen=True)
class Row:
    """A row of the ablation: its changes to ``melt``, to both phases and to each."""

    name: str
    title: str
    melt: Section
    both: Section
    phase1: Section
    phase2: Section


def _row(name: str, title: str, **sections: Section) -> Row:
    return Row(name, title, *(sections.get(part, {}) for part in ("melt", "both", "phase1", "phase2")))


MAIN = _row("main", "MELT", phase2=ADAPTIVE)
EVERYTHING = _row("gate", "element-wise gate (everything)")
ROWS = (
    EVERYTHING,
    _row("last", "last loop only", melt={"aggregation": "last"}),
    _row("no-interpolation", "no interpolation", phase1={"interpolation": "none"}),
    _row("no-chunk-wise", "no chunk-wise training", both={"chunk_wise": False}),
    _row("no-alignment", "no attention alignment", phase2={"attention_weight": 0.0}),
)


# The MELTs that are measured, by run and stage: after phase 1, finished, and after decoding.
COLUMNS = ((MAIN.name, "phase1"), (MAIN.name, "gate"), ("decoding", "gate"))
# What goes on with a finished MELT, most of whose tokens run alone: one core takes 70 minutes.
ALONE: Section = {
    "steps": 330,
    "batch_size": 16,
    "random_depth": 0.6,
    "truncate": 1,
    "chunk_sizes": [64],
    "decoding_share": 0.7,
    "save_every": 10,
    "eval_sequences": 16,
}
ALONE_LENGTH = 128  # tokens per sequence


def data_section(folder: Path, size: Size, about: Section | None = None) -> Section:
    """Return the data section for a folder of text_data.py. ``about``: the content of its data.json, if known."""
    about = about or json.loads((folder / "data.json").read_text(encoding="utf-8"))
    names = about["sources"]
    return {
        "tokens": [str(folder / f"{name}.bin") for name in names],
        "held_out": [str(folder / f"{name}-held-out.bin") for name in names],
        "dtype": "uint16",
        "tokenizer": str(folder / "tokenizer"),
        "sequence_length": size.sequence,
    }


def content(
    row: Row,
    seed: int,
    size: Size,
    data: Path,
    root: Path,
    *,
    teacher: Path | None = None,
    names: Section | None = None,
) -> Section:
    """Return a run's file. ``teacher``: of another run; None: the run trains its own. ``names``: see data_section."""
    own: Section = {"teacher": {**TEACHER, "batch_size": size.batch}, "model": size.model}
    batch = size.batch if teacher is None else size.row_batch
    cut = {"chunk_sizes": list(size.chunks), **DECODING}
    both = {**STUDENT, "batch_size": batch, **cut, **row.both}
    whole = {
        "output": str(root / f"{row.name}-{seed}"),
        "seed": seed,
        "precision": "tf32",
        "data": data_section(data, size, names),
        **(own if teacher is None else {"teacher": {"checkpoint": str(teacher)}}),
        "melt": {"chunk_size": size.chunk, **row.melt},
        "phase1": {**PHASE1, **both, **row.phase1},
        "phase2": {**PHASE2, **both, **row.phase2},
    }
    if teacher is None:
        whole["gate"] = {**GATE, "batch_size": batch, **cut}
    return whole


def decoding(seed: int, size: Size, data: Path, root: Path) -> Section:
    """Return the file of a run that goes on with the MELT of a main run, by decoding."""
    main = root / f"{MAIN.name}-{seed}"
    cut = {key: ALONE[key] for key in ("batch_size", "chunk_sizes", "decoding_share")}
    return {
        "output": str(root / f"decoding-{seed}"),
        "seed": seed,
        "threads": 1,
        "data": {**data_section(data, size), "sequence_length": ALONE_LENGTH},
        "teacher": {"checkpoint": str(main / "teacher")},
        "melt": {"chunk_size": size.chunk},
        "phase2": {"checkpoint": str(main / "gate"), **PHASE2, **ADAPTIVE, **STUDENT, **ALONE},
        "gate": {**GATE, "steps": 60, **cut},
    }
