"""Size and hash of a file: what a package says of everything in it. And files that appear whole or not at all."""

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
except ImportError:  # not on Windows: there nothing is swept
    fcntl = None  # type: ignore[assignment]

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


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
def new_file(target: Path, mode: int = 0o666) -> Iterator[Path]:
    """A file beside ``target`` to write, which takes its name and its place only when the block ends without an error.

    By then it is on the disk. ``mode``: its permissions, less the umask. Those that killed processes left are swept
    first. Raises OSError, which names the target: disk full, no permission, or no ordinary file in its place.
    """
    target = target.absolute()
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "it is no ordinary file, and is not replaced", str(target))
    with _disk_errors(target), _working_file(target.parent, f".{target.name}.partial-") as made:
        yield made
        made.chmod(mode & ~umask())
        _sync(made)
        made.replace(target)
        _sync(target.parent)


@contextmanager
def working_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """An empty directory in ``parent``, gone when the block ends; those of processes that were killed are swept first.

    As in melt_models.atomic, which a device does not have.
    """
    _sweep(parent, prefix)
    made, handle = _claimed(lambda: tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(handle)


def umask() -> int:
    """The process's mask of permissions."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _working_file(parent: Path, prefix: str) -> Iterator[Path]:
    _sweep(parent, prefix)

    def make() -> str:
        handle, name = tempfile.mkstemp(prefix=prefix, dir=parent)
        os.close(handle)
        return name

    made, handle = _claimed(make)
    try:
        yield made
    finally:
        made.unlink(missing_ok=True)
        os.close(handle)


def _claimed(make: Callable[[], str]) -> tuple[Path, int]:
    """What was made and a handle that locks it: the lock ends with the process, however that ends."""
    while True:
        made = Path(make())
        try:
            handle = os.open(made, os.O_RDONLY)
        except FileNotFoundError:  # another process swept it already
            continue
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks: nobody can sweep there either
                fcntl.flock(handle, fcntl.LOCK_EX)
        if made.exists():  # else another process swept it before it was locked
            return made, handle
        os.close(handle)


def _sweep(parent: Path, prefix: str) -> None:
    """Removes what killed processes left: all that no living one holds the lock of."""
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
    """Errors of a disk that is full name what was being written; the system does not for a file that is open."""
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
