"""Size and hash of a file: what a package says of everything in it. And files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileSpec:
    """Size and hash of a file in the package."""

    sha256: str
    bytes: int


def file_hash(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def within(file: Path, directory: Path) -> bool:
    """Whether a file lies in a directory, links followed. Of a snapshot in a cache of huggingface_hub the files are
    links to ``../../blobs``; these count as its own."""
    try:
        root, target = directory.resolve(), file.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False
    if target.is_relative_to(root):
        return True
    blobs = root.parent.parent / "blobs"
    return root.parent.name == "snapshots" and not blobs.is_symlink() and target.parent == blobs


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A file beside ``target`` to write, which takes its name and its place only when the block ends without an error.

    By then it is on the disk. Raises OSError (disk full, no permission).
    """
    target = target.absolute()
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.partial-", dir=target.parent)
    os.close(handle)
    made = Path(name)
    try:
        yield made
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(0o666 & ~mask)
        _sync(made)
        made.replace(target)
        _sync(target.parent)
    finally:
        made.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
