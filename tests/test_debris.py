"""What is written appears whole or not at all, whoever else writes there, and however its process ends."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from melt_models.atomic import TargetExistsError, new_directory
from melt_models.atomic import working_directory as directory_of_models
from melt_runtime.engines.store import new_engine
from melt_runtime.package.files import new_file
from melt_runtime.package.files import working_directory as directory_of_runtime

BUILDERS = {
    "a package": (
        "from melt_models.atomic import new_directory as make",
        "make(Path(sys.argv[1]) / 'made')",
        lambda directory: new_directory(directory / "made"),
    ),
    "a file": (
        "from melt_runtime.package.files import new_file as make",
        "make(Path(sys.argv[1]) / 'made')",
        lambda directory: new_file(directory / "made"),
    ),
    "an engine": (
        "from melt_runtime.engines.store import new_engine as make",
        "make(Path(sys.argv[1]), 'made')",
        lambda directory: new_engine(directory, "made"),
    ),
}


@contextmanager
def builder(what: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of building something."""
    imported, made, _ = BUILDERS[what]
    program = f"import sys, time\nfrom pathlib import Path\n{imported}\nwith {made}:\n    print('begun', flush=True)\n"
    with subprocess.Popen(
        [sys.executable, "-c", program + "    time.sleep(300)", str(directory)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


def debris(directory: Path) -> list[str]:
    """The unfinished things in a directory."""
    return sorted(path.name for path in directory.rglob(".made.partial-*"))


@pytest.mark.parametrize("what", BUILDERS)
def test_what_a_killed_run_left_is_swept_by_the_next_and_a_living_ones_is_not(what: str, tmp_path: Path) -> None:
    make = BUILDERS[what][2]
    with builder(what, tmp_path) as killed:
        killed.kill()
    (left,) = debris(tmp_path)
    with builder(what, tmp_path):
        (living,) = debris(tmp_path)
        assert living != left
        with make(tmp_path):
            assert living in debris(tmp_path)
            assert len(debris(tmp_path)) == 2
        assert debris(tmp_path) == [living]


def test_a_file_of_a_name_that_looks_like_debris_but_is_a_link_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / ".made.partial-link").symlink_to(tmp_path / "kept")
    with new_directory(tmp_path / "made"):
        pass
    assert (tmp_path / "kept").is_dir()
    assert (tmp_path / ".made.partial-link").is_symlink()


def test_an_old_directory_that_lies_aside_is_not_swept_while_its_place_is_empty(tmp_path: Path) -> None:
    aside = tmp_path / ".made.partial-abc-old"
    aside.mkdir()
    with directory_of_models(tmp_path, ".made.partial-", kept=tmp_path / "made"):
        assert aside.is_dir()
    (tmp_path / "made").mkdir()
    with directory_of_models(tmp_path, ".made.partial-", kept=tmp_path / "made"):
        assert not aside.exists()


@pytest.mark.parametrize("moment", ["before it was opened", "before it was locked"])
@pytest.mark.parametrize(
    "make", [directory_of_models, directory_of_runtime, lambda parent, prefix: new_file(parent / "x")]
)
def test_what_another_process_swept_before_it_was_locked_is_made_again(
    make: Callable[[Path, str], AbstractContextManager[Path]],
    moment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened, swept = os.open, []

    def sweep(path: Path) -> None:
        swept.append(path)
        path.rmdir() if path.is_dir() else path.unlink()

    def open_late(path: Any, flags: int, *rest: int, **named: Any) -> int:
        claims = not swept and ".x." in str(path) and not flags & os.O_CREAT
        if claims and moment == "before it was opened":
            sweep(Path(path))
        handle = opened(path, flags, *rest, **named)
        if claims and moment == "before it was locked":
            sweep(Path(path))
        return handle

    monkeypatch.setattr(os, "open", open_late)
    with make(tmp_path, ".x.partial-") as made:
        assert swept
        assert made.exists()
        assert made != swept[0]


def test_of_two_that_build_under_one_name_the_second_refuses_at_its_end(tmp_path: Path) -> None:
    target = tmp_path / "package"
    second = new_directory(target)
    late = second.__enter__()
    (late / "late").write_text("late")
    with new_directory(target) as first:
        (first / "early").write_text("early")
    with pytest.raises(TargetExistsError, match="filled by something else meanwhile"):
        second.__exit__(None, None, None)
    assert [path.name for path in target.iterdir()] == ["early"]
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_with_force_the_second_takes_the_place(tmp_path: Path) -> None:
    target = tmp_path / "package"
    second = new_directory(target, force=True)
    late = second.__enter__()
    (late / "late").write_text("late")
    with new_directory(target) as first:
        (first / "early").write_text("early")
    second.__exit__(None, None, None)
    assert [path.name for path in target.iterdir()] == ["late"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_took_the_name_meanwhile_is_not_replaced(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "package"
    build = new_directory(target)
    build.__enter__()
    if kind == "file":
        target.write_text("x")
    else:
        (tmp_path / "other").mkdir()
        target.symlink_to(tmp_path / "other")
    with pytest.raises(TargetExistsError):
        build.__exit__(None, None, None)
    assert target.is_symlink() or target.read_text() == "x"


@pytest.mark.parametrize("make", [new_directory, new_file])
def test_a_full_disk_names_what_was_written(make: object, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as error, make(tmp_path / "made"):  # type: ignore[operator]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error.value.filename == str(tmp_path / "made")
    assert debris(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_full_disk_in_a_librarys_own_kind_of_error_names_what_was_written(code: int, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=os.strerror(code)) as error, new_directory(tmp_path / "made"):
        raise RuntimeError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
    assert (error.value.filename, error.value.errno) == (str(tmp_path / "made"), code)


def test_a_copy_that_finds_no_room_does_not_name_its_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with pytest.raises(OSError, match="File too large") as error, new_directory(tmp_path / "made") as build:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(source), None, str(build / "source"))
    assert (error.value.filename, error.value.filename2) == (str(tmp_path / "made"), None)


def test_other_errors_name_nothing_they_have_nothing_to_do_with(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError) as error, new_directory(tmp_path / "made"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert error.value.filename is None


PROGRAM = """
import os, sys, time, typer
from pathlib import Path
from melt_models.atomic import new_directory
from melt_runtime.cli.errors import run_app
app = typer.Typer()

@app.command()
def main(target: Path) -> None:
    with new_directory(target):
        print("begun", flush=True)
        time.sleep(300)

run_app(app, "program")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_command_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "made")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            process.send_signal(number)
            assert process.wait(60) == 128 + number
            assert process.stderr is not None
            assert process.stderr.read() == ""
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_was_told_to_ignore_a_hangup_goes_on(tmp_path: Path) -> None:
    command = ["nohup", sys.executable, "-c", PROGRAM, str(tmp_path / "made")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            assert process.poll() is None
            process.terminate()
            assert process.wait(60) == 143
        finally:
            process.kill()


def test_a_file_for_its_owner_alone_is_so_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for mode in (0o600, 0o666):
            with new_file(tmp_path / "made", mode) as made:
                made.write_text("x")
            assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == mode
    finally:
        os.umask(before)


def test_a_fifo_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "made")
    with pytest.raises(FileExistsError, match="no ordinary file"), new_file(tmp_path / "made"):
        pass
    assert stat.S_ISFIFO((tmp_path / "made").stat().st_mode)
