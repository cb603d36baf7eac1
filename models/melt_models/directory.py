"""What a checkpoint directory is, seen from outside: for commands that have not imported PyTorch yet."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError


def check_directory(directory: Path) -> None:
    """Raises CheckpointError for what is not a directory with a config.json."""
    if not directory.exists():
        raise CheckpointError(f"checkpoint directory {directory} does not exist")
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory} is a file; give the directory that holds config.json")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json; it is not a Hugging Face checkpoint directory")
