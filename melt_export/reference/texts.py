"""Texts as token ids, for calibration and for measuring quality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from melt_runtime.errors import MeltError
from melt_runtime.text.tokenizer import TextTokenizer

_FEWEST_TOKENS = 1000  # in a vocabulary for general text, rather than for one task


def encode_text(
    directory: Path,
    path: Path | None,
    builtin: Callable[[], str],
    *,
    option: str,
    refused: type[MeltError],
    most: int = -1,
) -> list[int] | None:
    """Return token ids of the file at ``path`` (UTF-8), or of ``builtin``; None if the vocabulary is too small for the
    latter.

    - ``directory``: holds the tokenizer.
    - ``option``: the command-line option of the file, for messages.
    - ``most``: number of characters to read (-1: all).

    Raises ``refused`` for a file that cannot be used.
    """
    tokenizer = TextTokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None
    if path is None:
        return None if tokenizer is None or tokenizer.vocab_size < _FEWEST_TOKENS else tokenizer.encode(builtin())
    if tokenizer is None:
        raise refused(f"{option} needs a tokenizer, and the checkpoint has none")
    try:
        with path.open(encoding="utf-8") as file:
            ids = tokenizer.encode(file.read(most))
    except (OSError, UnicodeDecodeError) as error:
        raise refused(f"{option} {path} cannot be read: {error}") from error
    if len(ids) < 2:
        raise refused(f"{option} {path} has fewer than two tokens")
    return ids
