"""The example prompt that a package may carry: text that its model knows how to go on with."""

from __future__ import annotations

from pathlib import Path

from ..untrusted import read_text
from .reader import Package

EXAMPLE_PROMPT = "example_prompt.txt"
_MAX_BYTES = 4096


def example_prompt(package: Package) -> str | None:
    """The text of example_prompt.txt less its last line break; None where the package has none. Raises PackageError."""
    path = package.file(EXAMPLE_PROMPT)
    return None if path is None else read_example_prompt(path)


def read_example_prompt(path: Path) -> str:
    """The text of an example_prompt.txt less its last line break. Raises PackageError."""
    return read_text(path, _MAX_BYTES).removesuffix("\n").removesuffix("\r")
