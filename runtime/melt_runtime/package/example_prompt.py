"""A package's example prompt: text that its model can continue."""

from __future__ import annotations

from pathlib import Path

from ..untrusted import read_text
from .reader import Package

EXAMPLE_PROMPT = "example_prompt.txt"
_MAX_BYTES = 4096


def example_prompt(package: Package) -> str | None:
    """Return example_prompt.txt without its final line break, or None. Raises PackageError."""
    path = package.file(EXAMPLE_PROMPT)
    return None if path is None else read_example_prompt(path)


def read_example_prompt(path: Path) -> str:
    """Return the text of an example_prompt.txt without its final line break. Raises PackageError."""
    return read_text(path, _MAX_BYTES).removesuffix("\n").removesuffix("\r")
