"""Directories that take long to make and are made once per test run, however many processes it has."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory shared by all processes of this run; pytest-xdist gives each its own below it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(folder: Path, name: str, key: str, make: Callable[[Path], None]) -> Path:
    """Return the directory that ``make`` fills for this key. One process makes it, the others wait."""
    place = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=folder))
            make(unfinished)
            unfinished.rename(place)
    return place
