"""What the tests start ends: by Ctrl-C even where it was ignored, and by its time limit."""

from __future__ import annotations

import ast
import re
import signal
import subprocess
import sys
from pathlib import Path

from processes import LIMIT, started

TESTS = Path(__file__).parent
WAITING = "import time; print(flush=True); time.sleep(100)"
STARTED_IGNORING = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
raise SystemExit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
"""
INTERRUPTS_A_CHILD = """
import os, signal, subprocess, sys
from processes import let_ctrl_c_through, started
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
let_ctrl_c_through()
with started([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
"""


def test_ctrl_c_reaches_a_process_though_the_tests_were_started_with_it_ignored() -> None:
    command = [sys.executable, "-c", STARTED_IGNORING, "-c", INTERRUPTS_A_CHILD, WAITING]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr


def test_a_process_is_killed_at_its_limit_and_at_the_end_of_its_block() -> None:
    with started([sys.executable, "-c", WAITING], limit=0.1, stdout=subprocess.DEVNULL) as slow:
        assert slow.wait(LIMIT) == -signal.SIGKILL
    with started([sys.executable, "-c", WAITING], stdout=subprocess.DEVNULL) as left:
        assert left.poll() is None
    assert left.returncode == -signal.SIGKILL


def test_every_process_of_the_tests_has_a_limit() -> None:
    unlimited = []
    for file in sorted(TESTS.glob("*.py")):
        calls = (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        for call in calls:
            name = ast.unparse(call.func)
            of_a_process = name.endswith(".communicate") or re.search(r"(process|program|server|child)\.wait$", name)
            if name in ("subprocess.run", "subprocess.check_output") or of_a_process:
                named = {keyword.arg for keyword in call.keywords}
                if not (named & {"timeout", None} or (of_a_process and call.args)):
                    unlimited.append(f"{file.name}:{call.lineno}: {name}")
    assert not unlimited
