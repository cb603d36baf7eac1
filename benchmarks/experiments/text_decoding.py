"""Writes the runs that go on with the MELTs of text_train.py, whose tokens then run alone, as in decoding.

python benchmarks/experiments/text_decoding.py [--size gpu]
melt-train all --config build/text/runs/decoding-0/run.yaml --resume    # then decoding-1: 75 minutes each on a core
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml
from melt_models.atomic import write_text
from text_runs import SEEDS, SIZES, decoding


def main(
    size: Annotated[str, typer.Option(help="The size of the runs that are there.")] = "cpu",
    data: Annotated[Path, typer.Option(help="Folder that text_data.py wrote.")] = Path("build/text/data"),
    root: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("build/text/runs"),
) -> None:
    """Write a run's file per seed."""
    if size not in SIZES:
        raise typer.BadParameter(f"sizes are {', '.join(SIZES)}")
    for seed in SEEDS:
        content = decoding(seed, SIZES[size], data, root)
        place = Path(content["output"])
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / "run.yaml", yaml.safe_dump(content, sort_keys=False))


if __name__ == "__main__":
    typer.run(main)
