"""Options from environment variables: one per option, such as MELT_RUN_SERVE_PORT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from ..untrusted import printable

KEYS_VARIABLE = "MELT_API_KEYS"
TRACEBACK_VARIABLE = "MELT_TRACEBACK"
_OURS = "MELT_"
_PROGRAMS = ("RUN", "EXPORT", "VERIFY", "CONVERT", "TRAIN")
_NEAR = 0.85  # how alike two names are, of 1, where a variable of another name is taken for a misspelt one


def prefix_of(program: str) -> str:
    """Return what the variables of a program begin with."""
    return program.upper().replace("-", "_")


def unread_variables(program: str, command: Callable[[], Any], environment: Iterable[str]) -> list[str]:
    """Return a sentence per variable that is meant for a program and that none of its options reads.

    ``command``: returns the program's command line. ``environment``: the names of all variables. A name that begins as
    the program's variables do is meant for it, and so is one that is almost the name of a variable that is read.
    """
    prefix = prefix_of(program)
    names = [name for name in sorted(environment) if name.startswith(_OURS)]
    if not names:
        return []
    known = {*_read(command(), prefix), KEYS_VARIABLE, TRACEBACK_VARIABLE}
    others = tuple(f"{_OURS}{one}_" for one in _PROGRAMS if f"{_OURS}{one}" != prefix)
    said = []
    for name in names:
        own = name.startswith(f"{prefix}_")
        near = get_close_matches(name, sorted(known), 1, cutoff=0.6 if own else _NEAR)
        if name in known or name.startswith(others) or not (own or near):
            continue
        advice = f"; did you mean {near[0]}?" if near else ""
        said.append(f"no option reads the variable {printable(name)}{advice}")
    return said


def _read(command: Any, prefix: str) -> Iterator[str]:
    """Yield the variables that a command's options, and those of its commands, are read from."""
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name:
            yield f"{prefix}_{parameter.name.upper()}"
    for name, one in getattr(command, "commands", {}).items():
        yield from _read(one, f"{prefix}_{prefix_of(name)}")
