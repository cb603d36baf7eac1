"""Directories and files that are written completely or not at all.

melt_runtime.package.files has its own: the two packages import nothing from each other.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where leftovers are not removed
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_OLD = "-old"
_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = (*_FULL, errno.EIO)


class TargetExistsError(ValueError):
    """The output directory is not empty, and ``force`` was not given."""


@contextmanager
def new_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory that gets the name ``target`` when the block ends without an error.

    Until then a directory of that name is untouched. Without ``force`` it is never replaced, even if it appears
    meanwhile. With ``force`` it is swapped out in one system call where the platform has one. Raises TargetExistsError,
    or an OSError (disk full, no permission) that names the target.
    """
    target = target.absolute()
    check_target(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _disk_errors(target), working_directory(target.parent, f".{target.name}.partial-", kept=target) as build:
        yield build
        _share(build)
        _sync_tree(build)
        _place(build, target, force)
        _sync(target.parent)


def write_text(target: Path, text: str) -> None:
    """Replace a file in one step, and make its directory. An OSError (disk full, no permission) names the target."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _disk_errors(target), working_directory(target.parent, f".{target.name}.partial-") as build:
        made = build / target.name
        made.write_text(text, encoding="utf-8")
        _sync(made)
        made.replace(target)
        _sync(target.parent)


@contextmanager
def working_directory(parent: Path, prefix: str, *, kept: Path | None = None) -> Iterator[Path]:
    """Yield an empty directory in ``parent`` and remove it when the block ends.

    First removes directories with the same prefix that killed processes left behind. While the path ``kept`` does not
    exist, a directory that was moved aside from that name is not removed.
    """
    for left in parent.glob(glob.escape(prefix) + "*"):
        if not (left.name.endswith(_OLD) and kept is not None and not kept.exists()):
            sweep(left)
    made, handle = _claimed(parent, prefix)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(handle)


def _claimed(parent: Path, prefix: str) -> tuple[Path, int]:
    """Create a directory and return it with a file handle that locks it until the process ends."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            handle = os.open(made, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it already
            continue
        if fcntl is not None:
            with suppress(OSError):  # on a file system without locks no process removes it
                fcntl.flock(handle, fcntl.LOCK_EX)
        if made.exists():  # False if another process removed it before it was locked
            return made, handle
        os.close(handle)


def sweep(left: Path) -> None:
    """Remove a directory or file unless a living process holds its lock."""
    if fcntl is None or left.is_symlink() or not (left.is_dir() or left.is_file()):
        return
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
    """Turn the libraries' various errors of a full disk into an OSError that names ``target``."""
    try:
        yield
    except OSError as error:
        # A copy that fails names its source, which has room enough.
        if error.errno in _FULL or (error.filename is None and error.errno in _DISK):
            error.filename, error.filename2 = str(target), None
        raise
    except Exception as error:
        full = next((code for code in _DISK if os.strerror(code) in str(error)), None)
        if full is not None:
            raise OSError(full, os.strerror(full), str(target)) from error
        raise


def check_target(target: Path, *, force: bool = False) -> None:
    """Raise TargetExistsError if ``target`` is a file, or a non-empty directory without ``force``."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise TargetExistsError(f"{target} exists and is not a directory; choose another output name")
    above = next((parent for parent in target.absolute().parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise TargetExistsError(f"{target} cannot be made: {above} is a file")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise TargetExistsError(f"{target} exists and is not empty; choose another name or pass --force to replace it")


def _place(build: Path, target: Path, force: bool) -> None:
    """Rename ``build`` to ``target``. A plain rename replaces an empty directory and nothing else."""
    try:
        build.rename(target)
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise
        if not force:
            raise TargetExistsError(
                f"{target} was filled by something else meanwhile; choose another name or pass --force to replace it"
            ) from error
        _exchange(build, target)


def _exchange(build: Path, target: Path) -> None:
    """Swap two directories; afterwards ``build`` holds the old content."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        swapped = libc.renameat2(_AT_FDCWD, os.fsencode(build), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0
    except (OSError, AttributeError):
        swapped = False
    if swapped:
        return
    old = build.with_name(build.name + _OLD)
    target.rename(old)
    try:
        build.rename(target)
    except OSError:
        old.rename(target)
        raise
    old.rename(build)


def _share(directory: Path) -> None:
    """Set the permissions that the umask gives; some libraries write files for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for folder, _, files in os.walk(directory):
        Path(folder).chmod(0o777 & ~mask)
        for name in files:
            (Path(folder) / name).chmod(0o666 & ~mask)


def _sync_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
