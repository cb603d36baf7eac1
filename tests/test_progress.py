"""Progress: bars on a terminal, and elsewhere a line every few seconds that says what is done and what remains."""

from __future__ import annotations

import re
import sys
from time import sleep

import pytest
from melt_runtime.cli.tables import hash_progress
from melt_runtime.progress import Step, shown_progress

MOMENT = 0.01  # seconds between lines, for a test


def until(capsys: pytest.CaptureFixture[str], pattern: str, step: Step, *call: object) -> str:
    """Repeats a step until a line matches, and returns everything written."""
    text = ""
    for _ in range(3000):
        step(*call)  # type: ignore[arg-type]
        text += capsys.readouterr().err
        if re.search(pattern, text, re.MULTILINE):
            return text
        sleep(0.01)
    raise AssertionError(text)


def test_a_line_has_done_total_and_what_remains(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(seconds=MOMENT) as step:
        step("measuring", 1000, 250)
        until(capsys, r"^measuring: 250 of 1,000, \d+ s left$", step, "measuring", 1000, 0)
        step("measuring", 1000, 250)
        until(capsys, r"^measuring: 500 of 1,000, \d+ s left$", step, "measuring", 1000, 0)


def test_bytes_are_shown_in_their_units(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(seconds=MOMENT) as step:
        step("hashing files", 4_000_000_000, 1_500_000_000)
        until(capsys, r"^hashing files: 1\.5 GB of 4\.0 GB, \d+ s left$", step, "hashing files", 4_000_000_000, 0)


def test_a_step_of_unknown_length_says_how_long_it_has_run_and_when_it_is_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with shown_progress(seconds=MOMENT) as step:
        until(capsys, r"^tracing: \d+ s so far$", step, "tracing", 0, 0)
        step("next", 0, 0)
        assert re.search(r"^tracing: done in \d+ s$", until(capsys, r"^next: ", step, "next", 0, 0), re.MULTILINE)


def test_what_is_over_at_once_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress() as step:
        step("quick", 10, 10)
        step("quicker", 0, 0)
    assert capsys.readouterr().err == ""


def test_an_error_ends_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> None:
        with shown_progress(seconds=MOMENT) as step:
            until(capsys, "^failing: ", step, "failing", 0, 0)
            raise ValueError("the end")

    with pytest.raises(ValueError, match="the end"):
        failing()
    capsys.readouterr()
    sleep(5 * MOMENT)
    assert capsys.readouterr().err == ""


def test_a_closed_standard_error_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", _Closed())
    with shown_progress(seconds=MOMENT) as step:
        for _ in range(20):
            step("working", 0, 0)
            sleep(MOMENT)


class _Closed:
    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_checking_a_large_package_is_a_step_like_any_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("package")
    with hash_progress(directory) as small:
        assert small is None
    with (directory / "weights.data").open("wb") as file:
        file.truncate(300_000_000)
    monkeypatch.setattr("melt_runtime.progress.LINE_SECONDS", MOMENT)
    with hash_progress(directory) as advance:
        assert advance is not None
        advance(150_000_000)
        until(capsys, r"^checking the package: 150\.0 MB of 300\.0 MB", lambda *_: None)
