"""From a request's options and the package's calibration to the criteria by which tokens leave the loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError
from ..package.manifest import Manifest
from ..untrusted import shown
from .exit_criteria import AUTO, CRITERIA, parse_exit


def exit_options(manifest: Manifest, wanted: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every criterion, by option. Raises ArgumentError.

    ``wanted``: the request's ``exit``; it replaces the package's threshold. ``given``: the options of single criteria;
    ``exit_threshold`` None: the package's.
    """
    if wanted is None:
        threshold = given["exit_threshold"]
        return {**given, "exit_threshold": manifest.exit_threshold if threshold is None else threshold}
    if isinstance(wanted, str) and wanted.strip() == AUTO:
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
    else:
        found = parse_exit(wanted)
    for one in CRITERIA.values():
        value = given[one.option]
        if value is None or value == one.never:
            continue
        if found[one.option] != one.never and found[one.option] != value:
            raise ArgumentError(f"exit is {shown(wanted)} and {one.option} {shown(value)}; give one of them")
        found[one.option] = value
    return found
