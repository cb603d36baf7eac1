"""Makes a checkpoint with random weights in a real model's shape, for measuring size, memory and speed.

    python benchmarks/make_checkpoint.py OUTPUT [--shape ouro-1.4b] [--layers N] [--looplm]

It is written shard by shard, in little memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from melt_runtime.progress import shown_progress
from random_checkpoint import LOOPLM_SHAPES, PUBLISHED, SHAPES, make, make_published


def main(
    output: Annotated[Path, typer.Argument(help="Where the checkpoint goes.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join((*SHAPES, *PUBLISHED))}.")] = "ouro-1.4b",
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the shape has.", min=1)] = None,
    looplm: Annotated[bool, typer.Option("--looplm", help="Make a LoopLM, with caches for each loop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a directory that is not empty.")] = False,
) -> None:
    """Make a random checkpoint in a real model's shape: MELT's, a LoopLM's, or a published layout."""
    if shape in PUBLISHED:
        content = PUBLISHED[shape]
        if layers is not None:
            name = "num_hidden_layers" if "num_hidden_layers" in content else "n_layers_in_recurrent_block"
            content = {**content, name: layers}
        with shown_progress() as step:
            make_published(output, content, force=force, progress=step)
        return
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape} is not one of {', '.join((*SHAPES, *PUBLISHED))}")
    config = (LOOPLM_SHAPES if looplm else SHAPES)[shape]
    if layers is not None:
        config = type(config)(**{**config.to_dict(), "num_hidden_layers": layers})
    with shown_progress() as step:
        make(output, config, force=force, progress=step)


if __name__ == "__main__":
    typer.run(main)
