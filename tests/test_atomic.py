"""Directories that appear whole or not at all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import contents
from melt_models import (
    atomic,
)
from melt_models.atomic import TargetExistsError, new_directory
from processes import LIMIT


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A directory with something in it."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old.txt").write_text("old")
    return tmp_path / "target"


def test_a_directory_gets_its_name_only_at_the_end(tmp_path: Path) -> None:
    with new_directory(tmp_path / "deep" / "target") as build:
        (build / "new.txt").write_text("new")
        assert not (tmp_path / "deep" / "target").exists()
    assert contents(tmp_path) == {"deep/target/new.txt": b"new"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_directory_and_nothing_else(error: type[BaseException], old: Path) -> None:
    def write_and_fail() -> None:
        with new_directory(old, force=True) as build:
            (build / "new.txt").write_text("new")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert contents(old.parent) == {"target/old.txt": b"old"}
    assert [path.name for path in old.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("exchange", ["renameat2", "two renames"])
def test_force_replaces_the_old_directory(exchange: str, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if exchange == "two renames":
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())  # a platform without the call
    with new_directory(old, force=True) as build:
        (build / "new.txt").write_text("new")
        assert contents(old) == {"old.txt": b"old"}
    assert contents(old.parent) == {"target/new.txt": b"new"}
    assert [path.name for path in old.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced(force: bool, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    with pytest.raises(TargetExistsError, match="not a directory"), new_directory(tmp_path / "target", force=force):
        pass
    assert contents(tmp_path) == {"target": b"mine"}


def test_an_empty_directory_needs_no_force(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with new_directory(tmp_path / "target") as build:
        (build / "new.txt").write_text("new")
    assert contents(tmp_path) == {"target/new.txt": b"new"}


def test_a_killed_process_leaves_the_old_directory_whole(old: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from atomic import new_directory
with new_directory(Path(sys.argv[2]), force=True) as build:
    (build / "new.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    module = Path(atomic.__file__).parent  # alone, without the package's slow imports
    process = subprocess.run([sys.executable, "-c", script, module, old], check=False, timeout=LIMIT)
    assert process.returncode == -signal.SIGKILL
    assert contents(old) == {"old.txt": b"old"}
    with new_directory(old, force=True) as build:
        (build / "new.txt").write_text("new")
    assert contents(old) == {"new.txt": b"new"}
