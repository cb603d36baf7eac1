"""Bounded reading of untrusted input: JSON limited in size, depth and digits, and checks that declare a schema.

A check takes a value and its place, and returns the value to keep. It raises FieldError, which names the place.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .errors import ArgumentError, MeltError, PackageError

MOST_BYTES = 8 << 20  # per JSON file; parsed, it takes up to twenty times as much memory
MOST_DEPTH = 32  # of nested lists and objects
MOST_DIGITS = 40  # transformers writes "no limit" as a number of 31 digits
MOST_SIZE = 2**31 - 1  # of dimensions and counts

Check = Callable[[Any, str], Any]  # (value, place) -> value to keep


class FieldError(ValueError):
    """A value that breaks the schema; the message names its place."""


def parse_json(content: str | bytes) -> Any:
    """Parse JSON text. Raises ValueError, in one sentence, if it is too large, too deep, or no JSON."""
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has {len(content):,} bytes; {MOST_BYTES:,} are read")
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text at byte {error.start}") from error
    try:
        value = json.loads(text, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    _bound_depth(value)
    return value


def read_text(path: Path, most: int = MOST_BYTES, error: type[MeltError] = PackageError) -> str:
    """Read a text file. Raises ``error``, naming the file, if it is no ordinary file, too large or not UTF-8."""
    try:
        if not path.is_file():
            raise error(f"{path} is not an ordinary file")
        with path.open("rb") as file:
            # By the file's size, because read() allocates its whole argument first.
            content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
        if len(content) > most:
            raise error(f"{path} has more than the {most:,} bytes that are read of such a file")
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text at byte {problem.start}") from problem
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {problem}") from problem


def read_object(path: Path, error: type[MeltError] = PackageError) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises ``error``, naming the file."""
    text = read_text(path, error=error)
    try:
        value = parse_json(text)
    except ValueError as problem:
        raise error(f"{path}: {problem}") from problem
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object")
    return value


def whole(least: int = 1, most: int = MOST_SIZE) -> Check:
    """Accept a whole number."""

    def check(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            _refuse(value, where, f"a whole number from {least} to {most}")
        return value

    return check


def number(least: float, most: float) -> Check:
    """Accept a finite number."""

    def check(value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            _refuse(value, where, f"a number from {least:g} to {most:g}")
        return value

    return check


def flag(value: Any, where: str) -> bool:
    """Accept true or false."""
    return value if isinstance(value, bool) else _refuse(value, where, "true or false")


def text(most: int = 256, pattern: str | None = None) -> Check:
    """Accept printable text without line breaks that matches ``pattern`` as a whole."""

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            _refuse(value, where, f"printable text of up to {most} characters")
        if pattern is not None and not re.fullmatch(pattern, value):
            _refuse(value, where, f"text of the form {pattern}")
        return value

    return check


def one_of(*values: str) -> Check:
    """Accept one of a few names."""

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or value not in values:
            _refuse(value, where, f"one of {', '.join(values)}")
        return value

    return check


def optional(inner: Check) -> Check:
    """Accept null, or what another check accepts."""
    return lambda value, where: None if value is None else inner(value, where)


def either(*checks: Check) -> Check:
    """Accept what any of several checks accepts. If none does, the last one's error is raised."""

    def check(value: Any, where: str) -> Any:
        for inner in checks[:-1]:
            try:
                return inner(value, where)
            except FieldError:
                continue
        return checks[-1](value, where)

    return check


def listed(inner: Check, least: int = 0, most: int = 1 << 16) -> Check:
    """Accept a list, kept as a tuple."""

    def check(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            _refuse(value, where, f"a list of {least} to {most} entries")
        return tuple(inner(one, f"{where}[{at}]{_label(one)}") for at, one in enumerate(value))

    return check


def mapping(inner: Check, key: Check | None = None, most: int = 1 << 16) -> Check:
    """Accept an object whose names and values each pass one check."""
    named = text() if key is None else key

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > most:
            _refuse(value, where, f"an object of up to {most} entries")
        return {named(name, f"a name in {where}"): inner(one, f"{where}.{name}") for name, one in value.items()}

    return check


def record(make: Callable[..., Any], fields: Mapping[str, Check], defaults: Mapping[str, Any] | None = None) -> Check:
    """Accept an object with these fields and pass them to ``make`` by name; those in ``defaults`` may be absent."""

    def check(value: Any, where: str) -> Any:
        _require_object(value, where)
        unknown = next((name for name in value if name not in fields), None)
        if unknown is not None:
            raise FieldError(f"{where} has the unknown field {shown(unknown)}")
        return make(**fields_of(value, where, fields, defaults or {}))

    return check


def fields_of(value: Any, where: str, fields: Mapping[str, Check], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object's checked fields; ignore its other fields."""
    _require_object(value, where)
    missing = next((name for name in fields if name not in value and name not in defaults), None)
    if missing is not None:
        raise FieldError(f"{where} is incomplete: it lacks {missing}")
    prefix = f"{where}." if where else ""
    return {
        name: check(value[name], f"{prefix}{name}") if name in value else defaults[name]
        for name, check in fields.items()
    }


def partly(fields: Mapping[str, Check]) -> Check:
    """Accept an object, kept as it is, whose known fields pass their checks; they may be null or absent."""

    def check(value: Any, where: str) -> dict[str, Any]:
        _require_object(value, where)
        for name, inner in fields.items():
            if value.get(name) is not None:
                inner(value[name], f"{where}.{name}")
        return value

    return check


def whole_number(name: str, value: object) -> None:
    """Raise ArgumentError unless ``value`` is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} is {value!r}; it must be a whole number from 1")


def shown(value: Any) -> str:
    """Format a value for an error message: short, and without control characters."""
    try:
        return printable(_SHORT.repr(value))
    except ValueError:  # Python converts no number of more than 4,300 digits
        return "a number too long to spell"


def brief(error: BaseException, most: int = 400) -> str:
    """Return an error's message as one printable line of at most ``most`` characters."""
    line = printable(" ".join(str(error).split())) or type(error).__name__
    return line if len(line) <= most else f"{line[:most]}..."


def printable(text: str, kept: str = "") -> str:
    """Escape the characters that a terminal would act on, except those in ``kept``: control and escape characters, line
    separators, direction overrides, lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if c not in kept and _acts(c) else c for c in text)


def _acts(character: str) -> bool:
    return unicodedata.category(character) in _ACTING or character in _DIRECTIONS


_ACTING = ("Cc", "Cs", "Zl", "Zp")
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_TOO_DEEP = f"its lists and objects lie more than {MOST_DEPTH} deep in each other"


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits; {MOST_DIGITS} are read")
    return int(digits)


def _bound_depth(value: Any) -> None:
    """Raise ValueError if values are nested too deep. Level by level, so that the check itself does not recurse."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _inside(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (one for one in inner if isinstance(one, dict | list))


def _require_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        _refuse(value, where, "an object")


def _label(entry: Any) -> str:
    """Return a list entry's own name for the error message, if it has one."""
    name = next((entry[key] for key in ("name", "input") if key in entry), None) if isinstance(entry, dict) else None
    return f" ({printable(name[:64])})" if isinstance(name, str) else ""


def _refuse(value: Any, where: str, wanted: str) -> NoReturn:
    raise FieldError(f"{where} is {shown(value)}; it must be {wanted}")
