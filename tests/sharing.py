"""What takes long to make, made once in a run of the tests, however many processes it has."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes of this run have in common: pytest-xdist gives each its own one in it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(folder: Path, name: str, key: str, make: Callable[[Path], None]) -> Path:
    """The directory that ``make`` fills for this key: one process makes it, the others wait and get the same."""
    place = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=folder))
            make(unfinished)
            unfinished.rename(place)
    return place
