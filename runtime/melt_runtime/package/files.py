"""Sizes and hashes of files, and atomic writing.

melt_models.atomic has its own: the two packages import nothing from each other.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # missing on Windows, where leftovers stay
    fcntl = None  # type: ignore[assignment]

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class FileSpec:
    """The size and hash of a file in a package."""

    sha256: str
    bytes: int


def file_hash(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def within(file: Path, directory: Path) -> bool:
    """Return whether a file lies in a directory, with links followed.

    The ``../../blobs`` of a huggingface_hub snapshot count as part of it.
    """
    try:
        root, target = directory.resolve(), file.resolve()
    except (OSError, RuntimeError):  # links that form a cycle
        return False
    if target.is_relative_to(root):
        return True
    blobs = root.parent.parent / "blobs"
    return root.parent.name == "snapshots" and not blobs.is_symlink() and target.parent == blobs


@contextmanager
def new_file(target: Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield a file to write that replaces ``target`` atomically, once the block ends without error and the data is on
    disk.

    ``mode``: its permissions, less the umask. Leftovers of killed processes are removed first. Raises OSError, which
    names the target: disk full, no permission, or not an ordinary file.
    """
    target = target.absolute()
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "it is no ordinary file, and is not replaced", str(target))
    with _disk_errors(target), working_directory(target.parent, f".{target.name}.partial-") as directory:
        made = directory / target.name
        made.touch()
        yield made
        made.chmod(mode & ~umask())
        _sync(made)
        made.replace(target)
        _sync(target.parent)


@contextmanager
def working_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield an empty directory in ``parent`` that is removed with the block. Leftovers of killed processes are removed
    first."""
    _sweep(parent, prefix)
    made, handle = _claimed(parent, prefix)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(handle)


def umask() -> int:
    """Return the process's umask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _claimed(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a directory. Return it and a handle whose lock lasts until the process ends."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            handle = os.open(made, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it
            continue
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks, where leftovers stay
                fcntl.flock(handle, fcntl.LOCK_EX)
        if made.exists():  # else another process removed it before it was locked
            return made, handle
        os.close(handle)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove leftovers of killed processes: those without a lock."""
    if fcntl is None:
        return
    for left in parent.glob(glob.escape(prefix) + "*"):
        if left.is_symlink() or not (left.is_dir() or left.is_file()):
            continue
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
            finally:
                os.close(handle)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Add the target's name to disk errors of open files, which have none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _DISK:
            error.filename = str(target)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
