"""Text letter by letter, for models that two cores train in minutes: a book's token files as letters, and the runs.

    python benchmarks/experiments/letters.py [--data build/text/data] [--root build/letters]
    melt-train all --config build/letters/letters-0/run.yaml --resume    # then letters-1, ...: minutes each

``--data`` is what text_data.py has written. The King James Bible has few enough letters (about 80) for a head that
costs little, and whole books of it are held out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from melt_models.training.data import character_tokenizer
from melt_models.training.tasks import END, PAD
from tokenizers import Tokenizer

SOURCE = "king-james"
SEEDS = (0, 1)
LENGTH = 64  # letters per sequence
PHASE: dict[str, Any] = {
    "batch_size": 24,
    "learning_rate": 1.0e-3,
    "gate_learning_rate": 1.0e-2,
    "optimizer": "muon",
    "matrix_learning_rate": 1.0e-2,
    "schedule": "cosine",
    "warmup_steps": 20,
    # Letters are written one by one, so half of the chunks are single letters.
    "chunk_sizes": [1, 1, 1, 1, 2, 4, 8, 16],
    "save_every": 50,
}
RECIPE: dict[str, Any] = {
    "threads": 1,
    "model": {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "total_ut_steps": 4,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "embedding_std": 1.0,
    },
    "melt": {"chunk_size": 16},
    "teacher": {
        "steps": 1000,
        "batch_size": 32,
        "optimizer": "muon",
        "matrix_learning_rate": 0.02,
        "learning_rate": 3.0e-3,
        "weight_decay": 0.05,
        "schedule": "flat-cosine",
        "warmup_steps": 50,
        "entropy_weight": 1.0,  # keeps the exit distribution even, so that early loops are trained
        "save_every": 100,
    },
    "phase1": {**PHASE, "steps": 80, "interpolation_share": 0.6},
    "phase2": {**PHASE, "steps": 180, "attention_weight": 0.02, "teacher_loop": "last", "random_depth": 0.5},
    "gate": {
        **{key: PHASE[key] for key in ("batch_size", "chunk_sizes", "save_every")},
        "steps": 60,
        "learning_rate": 3.0e-2,
    },
}


def letters(data: Path, root: Path) -> dict[str, Any]:
    """Write a book's letters as token files, and their tokenizer. Returns the data section of a run."""
    tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    texts = [
        tokenizer.decode(np.fromfile(data / f"{SOURCE}{part}.bin", np.uint16).tolist()) for part in ("", "-held-out")
    ]
    vocabulary = (PAD, END, *sorted(set(texts[0])))
    ids = {letter: index for index, letter in enumerate(vocabulary)}
    root.mkdir(parents=True, exist_ok=True)
    for text, name in zip(texts, ("letters.bin", "letters-held-out.bin"), strict=True):
        np.array([ids[letter] for letter in text if letter in ids], np.uint16).tofile(root / name)
    character_tokenizer(vocabulary, LENGTH).save_pretrained(root / "tokenizer")
    return {
        "tokens": [str(root / "letters.bin")],
        "dtype": "uint16",
        "tokenizer": str(root / "tokenizer"),
        "sequence_length": LENGTH,
    }


def main(
    data: Annotated[Path, typer.Option(help="What text_data.py has written.")] = Path("build/text/data"),
    root: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("build/letters"),
) -> None:
    """Write the data and the files of the runs."""
    section = letters(data, root)
    for seed in SEEDS:
        place = root / f"letters-{seed}"
        place.mkdir(exist_ok=True)
        content = {"output": str(place), "seed": seed, "data": section, **RECIPE}
        (place / "run.yaml").write_text(yaml.dump(content, Dumper=_Plain, sort_keys=False), encoding="utf-8")


class _Plain(yaml.SafeDumper):
    """Writes shared lists out instead of referring to them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


if __name__ == "__main__":
    typer.run(main)
