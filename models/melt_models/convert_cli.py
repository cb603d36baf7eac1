"""The ``melt-convert`` command. It checks its arguments before it imports PyTorch, which takes seconds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from melt_hub import CHECKPOINT, local_directory

from .atomic import TargetExistsError, check_target
from .directory import check_directory, without_tokenizer
from .errors import CheckpointError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def convert_checkpoint(
    source: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint of a looped model or a Llama (config.json, safetensors): a directory, or "
            "org/name[@revision] on a hub."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Where the MELT checkpoint goes.")],
    loops: Annotated[
        int | None, typer.Option(help="Loops per token; default: the source's own, or 1 (Llama).", min=1)
    ] = None,
    chunk_size: Annotated[int, typer.Option(help="Prompt tokens that run their loops together.", min=1)] = 128,
    remote_code: Annotated[
        bool,
        typer.Option("--remote-code", help="Add a modelling file: transformers opens it with trust_remote_code=True."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output directory that is not empty.")] = False,
) -> None:
    """Turn a looped or Llama-shaped checkpoint into a MELT starting checkpoint. Its gates are untrained."""
    try:
        check_target(output, force=force)
        source = local_directory(source, CHECKPOINT)
        check_directory(source)

        from .convert import convert

        config = convert(source, output, loops=loops, chunk_size=chunk_size, force=force, remote_code=remote_code)
    except (CheckpointError, TargetExistsError, OSError) as error:
        print(f"melt-convert: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    deep = "1 loop" if config.total_ut_steps == 1 else f"{config.total_ut_steps} loops"
    print(f"{output}: MELT, {config.num_hidden_layers} layers, {deep}; ", end="")
    unread = ", never read in one loop" if config.total_ut_steps == 1 else ""
    print(f"untrained{unread}: {', '.join(config.untrained)}")
    if (missing := without_tokenizer(source)) is not None:
        print(f"melt-convert: {missing}", file=sys.stderr)


def main() -> None:
    """Run ``python -m melt_models.convert_cli``, for an install without melt_export."""
    app()


if __name__ == "__main__":
    main()
