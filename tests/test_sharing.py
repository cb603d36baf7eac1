"""Packages of the tests are made once, by whichever process needs them first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import LIMIT
from sharing import made_once

MAKE = """
import sys, time
from pathlib import Path
from sharing import made_once

def make(directory):
    with open(Path(sys.argv[1]) / "made", "a") as file:
        file.write("once\\n")
    time.sleep(0.3)
    (directory / "whole").touch()

print(made_once(Path(sys.argv[1]), "thing", "key", make), flush=True)
"""


def test_two_processes_make_a_thing_once_and_get_it_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKE, str(tmp_path)]
    options = {"cwd": Path(__file__).parent, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **options) for _ in range(2)]  # type: ignore[call-overload]
    first, second = (process.communicate(timeout=LIMIT)[0] for process in both)
    assert first == second
    assert (Path(first.strip()) / "whole").exists()
    assert (tmp_path / "made").read_text() == "once\n"


def test_what_could_not_be_made_is_tried_again(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        made_once(tmp_path, "thing", "key", fail)
    place = made_once(tmp_path, "thing", "key", lambda directory: (directory / "whole").touch())
    assert [path.name for path in place.iterdir()] == ["whole"]
    assert made_once(tmp_path, "thing", "other", lambda directory: None) != place
