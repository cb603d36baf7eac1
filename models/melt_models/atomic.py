"""Directories that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class TargetExistsError(ValueError):
    """The output directory holds something already and force was not given."""


@contextmanager
def new_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Builds a directory beside ``target`` and gives it that name only when the block ends without an error.

    Until then whatever stood under the name is untouched. With ``force`` an old directory is swapped out in one
    system call where the platform has it. Raises TargetExistsError or OSError (disk full, no permission).
    """
    target = target.absolute()
    check_target(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    build = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield build
        _share(build)
        _sync_tree(build)
        if target.exists():
            _exchange(build, target)
        else:
            build.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(build, ignore_errors=True)


def check_target(target: Path, *, force: bool = False) -> None:
    """Raises TargetExistsError if ``target`` is a file, or a non-empty directory without ``force``."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise TargetExistsError(f"{target} exists and is not a directory; choose another output name")
    above = next((parent for parent in target.absolute().parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise TargetExistsError(f"{target} cannot be made: {above} is a file")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise TargetExistsError(f"{target} exists and is not empty; choose another name or pass --force to replace it")


def _exchange(build: Path, target: Path) -> None:
    """Swaps two directories; afterwards ``build`` holds the old content."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        swapped = libc.renameat2(_AT_FDCWD, os.fsencode(build), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0
    except (OSError, AttributeError):
        swapped = False
    if swapped:
        return
    old = build.with_name(build.name + "-old")
    target.rename(old)
    try:
        build.rename(target)
    except OSError:
        old.rename(target)
        raise
    old.rename(build)


def _share(directory: Path) -> None:
    """The permissions that ordinary files and directories get here; some libraries write theirs for the owner only."""
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
