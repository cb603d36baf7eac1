"""From a request's options and the package's calibration to the criteria by which tokens leave the loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError
from ..package.manifest import Manifest
from ..untrusted import shown
from .exit_criteria import AUTO, NEVER, named_by_exit, parse_exit


def exit_options(manifest: Manifest, wanted: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every criterion, by option. Raises ArgumentError.

    ``wanted``: the request's ``exit``; it replaces the package's threshold. ``given``: the options of single criteria;
    None: not given. They add to ``wanted``, and none may differ from what it says.
    """
    asked = {option: value for option, value in given.items() if value is not None}
    if wanted is None:
        return {**parse_exit(NEVER), "exit_threshold": manifest.exit_threshold, **asked}
    if _is_auto(wanted):
        if not manifest.exit:
            raise ArgumentError(
                f"exit is {AUTO!r}, but this package was exported without a calibrated exit; export it with --exit "
                "auto:1pt or the like, or give a criterion such as 'entropy:0.3'"
            )
        wanted = str(manifest.exit["criteria"])
        try:
            found: dict[str, Any] = parse_exit(wanted)
        except ArgumentError as error:
            raise ArgumentError(f"the package's calibrated exit cannot be used: manifest.json: {error}") from error
        return _joined(wanted, found, asked)
    return with_criteria(wanted, asked)


def usual_loops(manifest: Manifest, wanted: str | None, min_loops: int = 1, exit_at_step: int | None = None) -> int:
    """Return the most loops of a token whose request does not give ``loops``: the package's, or for ``exit`` "auto" as
    many as it was calibrated with.

    A request that says otherwise how deep tokens go, by ``exit_at_step`` or ``min_loops`` above that number, takes the
    package's.
    """
    most = manifest.exit_loops
    deeper = isinstance(min_loops, int) and min_loops > most
    return most if _is_auto(wanted) and exit_at_step is None and not deeper else manifest.loops


def _is_auto(wanted: Any) -> bool:
    return isinstance(wanted, str) and wanted.strip() == AUTO


def with_criteria(wanted: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every criterion, by option, of an ``exit`` and the options given beside it. Raises
    ArgumentError where they contradict each other."""
    return _joined(wanted, parse_exit(wanted), asked)


def _joined(wanted: str, found: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    named = named_by_exit(wanted)
    for option, value in asked.items():
        if option in named and found[option] != value:
            raise ArgumentError(f"exit is {shown(wanted)} and {option} is {shown(value)}; give one of them")
    return {**found, **asked}
