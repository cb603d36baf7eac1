"""Checks of a checkpoint directory that need no PyTorch."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError

# Tokenizer files that transformers can convert and the tokenizers library cannot read.
_OTHER_FORMS = ("tokenizer.model", "vocab.json", "tiktoken.model", "tekken.json")


def check_directory(directory: Path) -> None:
    """Raise CheckpointError unless ``directory`` is a directory with a config.json."""
    if not directory.exists():
        raise CheckpointError(f"checkpoint directory {directory} does not exist")
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory} is a file; give the directory that holds config.json")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json; it is not a Hugging Face checkpoint directory")


def without_tokenizer(checkpoint: Path) -> str | None:
    """Describe a missing tokenizer.json and how to make one; return None if the checkpoint has it."""
    if (checkpoint / "tokenizer.json").is_file():
        return None
    other = next((name for name in _OTHER_FORMS if (checkpoint / name).is_file()), None)
    way = ""
    if other is not None:
        place = repr(str(checkpoint))
        way = f"; AutoTokenizer.from_pretrained({place}).save_pretrained({place}) of transformers makes it from {other}"
    return f"{checkpoint} has no tokenizer.json, so that prompts and answers will be token ids{way}"
