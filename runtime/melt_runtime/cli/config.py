"""Options of all commands from one TOML file: a section per command, a key per option."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from ..errors import ArgumentError
from ..untrusted import shown

_MOST_BYTES = 1 << 20


def config_read(context: typer.Context, file: Path | None) -> Path | None:
    """Let the options of a file be the defaults of all commands. The callback of ``--config``. Raises ArgumentError."""
    if file is not None:
        context.default_map = read_config(file, context.command)
    return file


def section_read(context: typer.Context, file: Path | None) -> Path | None:
    """Let a file's options for one command be its defaults. The callback of that command's own ``--config``. Raises
    ArgumentError."""
    if file is not None and context.parent is not None:
        found = read_config(file, context.parent.command).get(str(context.info_name), {})
        context.default_map = {**(context.default_map or {}), **found}
    return file


def read_config(file: Path, program: Any) -> dict[str, dict[str, Any]]:
    """Read a file of options for the commands of a program, by command and parameter.

    Raises ArgumentError for a file that is no TOML, an unknown section or option, and a value of another kind.
    """
    try:
        with file.open("rb") as opened:
            raw = opened.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise ArgumentError(f"--config {file} has over {_MOST_BYTES:,} bytes; no file of options is that large")
        content = tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise ArgumentError(f"--config {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"--config {file} is no TOML: {error}") from error
    found: dict[str, dict[str, Any]] = {}
    for section, options in content.items():
        if not isinstance(options, dict):
            raise ArgumentError(f"--config {file}: {section} is outside a section; options belong under [serve] or so")
        where = f"--config {file}: section [{section}]"
        command = program.commands.get(section)
        if command is None:
            raise ArgumentError(f"{where} is no command{_instead(section, program.commands)}")
        parameters = {name: one for one in command.params for name in _names(one)}
        found[section] = {}
        for key, value in options.items():
            name = key.replace("-", "_")
            if name not in parameters:
                raise ArgumentError(f"{where} has an unknown option {shown(key)}{_instead(name, parameters)}")
            parameter = parameters[name]
            if parameter.name in found[section]:
                raise ArgumentError(f"{where} has the option {name.replace('_', '-')} twice")
            found[section][parameter.name] = _value(parameter, value, f"{where}: {key}")
    return found


def _names(parameter: Any) -> set[str]:
    """Return the names of a parameter in a file: as on the command line, and as in the program."""
    return {parameter.name, *(option.lstrip("-").replace("-", "_") for option in parameter.opts)}


def _instead(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0].replace('_', '-')}?" if near else ""


def _value(parameter: Any, value: Any, where: str) -> Any:
    """Return a value as the command line would give it. Raises ArgumentError for one of another kind."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise ArgumentError(f"{where} is {shown(value)}; it must be true or false")
        return value
    many = getattr(parameter, "multiple", False) or parameter.nargs == -1
    if many and isinstance(value, list):
        return tuple(_text(one, where) for one in value)
    return (_text(value, where),) if many else _text(value, where)


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ArgumentError(f"{where} is {shown(value)}; it must be a text or a number")
    return str(value)
