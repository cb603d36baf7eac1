"""What comes from outside is read through bounds, and what is said of it can be shown on a terminal."""

from __future__ import annotations

import io
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import typer
from melt_runtime import PackageError
from melt_runtime.cli.errors import for_terminal, one_line, reported_errors
from melt_runtime.untrusted import (
    MOST_DEPTH,
    FieldError,
    brief,
    either,
    listed,
    mapping,
    number,
    one_of,
    optional,
    parse_json,
    printable,
    read_object,
    read_text,
    record,
    shown,
    text,
    whole,
)


def nested(depth: int) -> str:
    """Lists within each other."""
    return "[" * depth + "]" * depth


def test_json_is_read_up_to_its_bounds_and_no_further() -> None:
    assert parse_json(nested(MOST_DEPTH))
    assert parse_json("1" * 40) == int("1" * 40)
    assert parse_json(b'{"model_max_length": 1000000000000000019884624838656}')
    for content, says in (
        (nested(MOST_DEPTH + 2), "deep"),
        (nested(200_000), "deep"),
        ("1" * 41, "41 digits"),
        ("-" + "1" * 10_000, "digits"),
        (b"\xff", "UTF-8"),
        (" " * (9 << 20), "bytes"),
        ("{", "JSON"),
    ):
        with pytest.raises(ValueError, match=says):
            parse_json(content)


def test_what_is_no_ordinary_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opened, it would wait for a writer
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), tmp_path / "missing"):
        with pytest.raises(PackageError, match="not an ordinary file"):
            read_object(path)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (whole(1, 9), [1, 9], [0, 10, True, 1.0, "1", None, 10**39]),
        (number(0, 1), [0, 1, 0.5], [-1, 2, float("nan"), float("inf"), True, "0", 10**39]),
        (text(3), ["", "abc", "é"], ["abcd", "\x1b", "a\n", "\ud800", "\u202e", 3, None]),
        (text(9, "[a-z]+"), ["abc"], ["", "a-b", "abc1"]),
        (one_of("a", "b"), ["a"], ["c", ["a"], None]),
        (optional(whole()), [None, 1], [0]),
        (either(one_of("batch"), whole()), ["batch", 3], ["chunk", 0]),
        (listed(whole(), least=1, most=2), [[1], [1, 2]], [[], [1, 2, 3], [0], {"a": 1}, "12"]),
        (mapping(whole(), most=1), [{}, {"a": 1}], [{"a": 1, "b": 2}, {"a": 0}, {"\x1b": 1}, [1]]),
        (record(dict, {"a": whole(), "b": whole()}, {"b": 1}), [{"a": 1}], [{}, {"a": 1, "c": 1}, {"a": 0}, []]),
    ],
    ids=["whole", "number", "text", "pattern", "one_of", "optional", "either", "listed", "mapping", "record"],
)
def test_a_check_takes_what_is_right_and_names_the_place_of_what_is_not(
    check: Any, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        check(value, "here")
    for value in bad:
        with pytest.raises(FieldError, match="here") as refusal:
            check(value, "here")
        assert str(refusal.value).isprintable()
        assert len(str(refusal.value)) < 300


def test_a_value_is_shown_briefly_whatever_it_is() -> None:
    for value in ("x" * 10**6, list(range(10**5)), {"a": {"b": "\x1b[2J"}}, 10**5000, "\ud800\u2028"):
        assert len(shown(value)) < 400
        assert shown(value).isprintable()


def test_an_error_never_takes_a_line_more_or_an_escape_sequence_to_the_terminal() -> None:
    for error in (PackageError("a\nb\x1b[2J\u202ec"), OSError(2, "No such file", "a\x1b]0;x\x07"), KeyError("\x9b")):
        assert one_line(error).isprintable()
        assert brief(error).isprintable()
    assert one_line(PackageError("Größe 🙂 日本")) == "Größe 🙂 日本"
    assert len(brief(ValueError("x" * 10**6))) < 500


def test_generated_text_is_shown_on_a_terminal_without_what_it_would_obey_and_written_to_a_file_as_it_is() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    said = "one\ttwo\n\x1b]0;title\x07\x9b2J 👩\u200d🚀 fin"
    assert for_terminal(said, io.StringIO()) == said
    assert for_terminal(said, Terminal()) == "one\ttwo\n\\x1b]0;title\\x07\\x9b2J 👩\u200d🚀 fin"
    assert printable("a\rb") == "a\\rb"


def test_a_small_file_takes_no_buffer_of_all_that_may_be_read(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text("{}")
    tracemalloc.start()
    try:
        assert read_text(tmp_path / "small.json", 256 << 20) == "{}"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_too_little_memory_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reported_errors("melt-run"):
        raise MemoryError
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == "melt-run: there is not enough memory\n"
