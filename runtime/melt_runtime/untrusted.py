"""What comes from outside, read through bounds: JSON of bounded size, depth and digits, and checks to declare a schema.

A check takes a value and says what is kept of it; it raises FieldError, which names the place.
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

MOST_BYTES = 8 << 20  # of a JSON file; its values take up to twenty times as much memory
MOST_DEPTH = 32  # of lists and objects within each other
MOST_DIGITS = 40  # transformers writes "no limit" as a number of 31
MOST_SIZE = 2**31 - 1  # of a dimension, and of all that is counted

Check = Callable[[Any, str], Any]  # a value and its place -> what is kept of it


class FieldError(ValueError):
    """A value is not what a schema wants; the message names its place."""


def parse_json(content: str | bytes) -> Any:
    """A JSON text. Raises ValueError, in one sentence, for what is too large, too deep, or no JSON."""
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
    """A file's text. Raises ``error``, which names the file, for what is no ordinary file, too large or not UTF-8."""
    try:
        if not path.is_file():
            raise error(f"{path} is not an ordinary file")
        with path.open("rb") as file:
            # A buffer of the whole bound would be taken before the first byte is read.
            content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
        if len(content) > most:
            raise error(f"{path} has more than the {most:,} bytes that are read of such a file")
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text at byte {problem.start}") from problem
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {problem}") from problem


def read_object(path: Path, error: type[MeltError] = PackageError) -> dict[str, Any]:
    """A file that holds a JSON object. Raises ``error``, which names the file."""
    text = read_text(path, error=error)
    try:
        value = parse_json(text)
    except ValueError as problem:
        raise error(f"{path}: {problem}") from problem
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object")
    return value


def whole(least: int = 1, most: int = MOST_SIZE) -> Check:
    """A whole number."""

    def check(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            _refuse(value, where, f"a whole number from {least} to {most}")
        return value

    return check


def number(least: float, most: float) -> Check:
    """A finite number."""

    def check(value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            _refuse(value, where, f"a number from {least:g} to {most:g}")
        return value

    return check


def flag(value: Any, where: str) -> bool:
    """True or false."""
    return value if isinstance(value, bool) else _refuse(value, where, "true or false")


def text(most: int = 256, pattern: str | None = None) -> Check:
    """Printable text without line breaks, as it can be shown anywhere; the whole of it matches ``pattern``."""

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) > most or not value.isprintable():
            _refuse(value, where, f"printable text of up to {most} characters")
        if pattern is not None and not re.fullmatch(pattern, value):
            _refuse(value, where, f"text of the form {pattern}")
        return value

    return check


def one_of(*values: str) -> Check:
    """One of a few names."""

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or value not in values:
            _refuse(value, where, f"one of {', '.join(values)}")
        return value

    return check


def optional(inner: Check) -> Check:
    """Null, or what another check takes."""
    return lambda value, where: None if value is None else inner(value, where)


def either(*checks: Check) -> Check:
    """What any of several checks takes; the last one's error counts."""

    def check(value: Any, where: str) -> Any:
        for inner in checks[:-1]:
            try:
                return inner(value, where)
            except FieldError:
                continue
        return checks[-1](value, where)

    return check


def listed(inner: Check, least: int = 0, most: int = 1 << 16) -> Check:
    """A list, kept as a tuple."""

    def check(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            _refuse(value, where, f"a list of {least} to {most} entries")
        return tuple(inner(one, f"{where}[{at}]{_label(one)}") for at, one in enumerate(value))

    return check


def mapping(inner: Check, key: Check | None = None, most: int = 1 << 16) -> Check:
    """An object whose values, and whose names, are all of a kind."""
    named = text() if key is None else key

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > most:
            _refuse(value, where, f"an object of up to {most} entries")
        return {named(name, f"a name in {where}"): inner(one, f"{where}.{name}") for name, one in value.items()}

    return check


def record(make: Callable[..., Any], fields: Mapping[str, Check], defaults: Mapping[str, Any] | None = None) -> Check:
    """An object with these fields, given to ``make`` by name; ``defaults`` has those that may be absent."""

    def check(value: Any, where: str) -> Any:
        _require_object(value, where)
        unknown = next((name for name in value if name not in fields), None)
        if unknown is not None:
            raise FieldError(f"{where} has the unknown field {shown(unknown)}")
        return make(**fields_of(value, where, fields, defaults or {}))

    return check


def fields_of(value: Any, where: str, fields: Mapping[str, Check], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The checked fields of an object, whatever else it has."""
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
    """An object, kept as it is, of which some fields are known; a null or absent one is no fault."""

    def check(value: Any, where: str) -> dict[str, Any]:
        _require_object(value, where)
        for name, inner in fields.items():
            if value.get(name) is not None:
                inner(value[name], f"{where}.{name}")
        return value

    return check


def whole_number(name: str, value: object) -> None:
    """Raises ArgumentError unless ``value`` is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} is {value!r}; it must be a whole number from 1")


def shown(value: Any) -> str:
    """A value for a sentence: short, and without characters that a terminal would act on."""
    try:
        return printable(_SHORT.repr(value))
    except ValueError:  # Python spells no number of more than some thousand digits
        return "a number too long to spell"


def brief(error: BaseException, most: int = 400) -> str:
    """What a library says of a stranger's input, as part of a sentence: one line, printable, not too long."""
    line = printable(" ".join(str(error).split())) or type(error).__name__
    return line if len(line) <= most else f"{line[:most]}..."


def printable(text: str, kept: str = "") -> str:
    """Text in which what a terminal would act on is spelled out, but for the characters in ``kept``: control and
    escape characters, line separators, reversed direction, halves of surrogates."""
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
    """Level by level, so that what is too deep needs no deep recursion to be found."""
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
    """The name of an entry of a list, where it has one."""
    name = next((entry[key] for key in ("name", "input") if key in entry), None) if isinstance(entry, dict) else None
    return f" ({printable(name[:64])})" if isinstance(name, str) else ""


def _refuse(value: Any, where: str, wanted: str) -> NoReturn:
    raise FieldError(f"{where} is {shown(value)}; it must be {wanted}")
