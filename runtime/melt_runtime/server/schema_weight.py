"""Estimate the cost of a JSON schema's grammar before building it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from ..errors import ArgumentError
from .schema_patterns import overlap, patterns

MAX_VALUES = 10_000  # objects, lists and scalars; compiling them takes at most a second and 60 MB
MAX_OVERLAP = 12  # patterns that one text must match: with 20 compiling takes seconds, with 24 it does not end
MAX_MULTIPLE = 65_536  # of multipleOf, without decimal places: each remainder is a state of about 500 bytes
_ENUM_SHARE = 5  # enum scalars that cost as much as a value
_TEXT_SHARE = 64  # characters that cost as much as a value
_PAIR_SHARE = 4  # pairs of name patterns that cost as much as a value; all pairs are compared
_OVERLAP_SHARE = 20  # sets of overlapping patterns that cost as much as a value
_MAX_DEPTH = 100
_STATE_SHARE = 5  # remainders that cost as much as a value
_LARGEST = 10**30  # the largest multipleOf that is examined
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if"}


def weigh(schema: Any) -> int:
    """Return a schema's cost in values of 2.5 kB.

    Raises ArgumentError for more than MAX_VALUES values, MAX_MULTIPLE remainders or MAX_OVERLAP patterns on one text.
    """
    values = 0.0
    multiples: set[int] = set()
    combined = False
    for value, of_enum in _values(schema):
        cost = 1.0
        if isinstance(value, str):
            cost += len(value) / _TEXT_SHARE
        if isinstance(value, dict):
            cost += sum(map(len, value)) / _TEXT_SHARE
            patterns = value.get("patternProperties")
            cost += len(patterns) ** 2 / _PAIR_SHARE if isinstance(patterns, dict) else 0
            combined = combined or not _COMBINING.isdisjoint(value)
            multiples |= _multiple(value.get("multipleOf"))
        values += cost / _ENUM_SHARE if of_enum and not isinstance(value, dict | list) else cost
        if values > MAX_VALUES:
            raise ArgumentError(
                f"the JSON schema is too large: it has more than {MAX_VALUES:,} values (each {_TEXT_SHARE} "
                f"characters count as another, {_ENUM_SHARE} scalars of an enum as one, and patternProperties by pairs)"
            )
    return math.ceil(values + _remainders(multiples, combined) / _STATE_SHARE + _overlap_cost(schema))


def _overlap_cost(schema: Any) -> float:
    """Return the cost of patterns that one text must match: each set of them may be a state."""
    most = overlap(schema)
    if most > MAX_OVERLAP:
        raise ArgumentError(
            f"the JSON schema is too large: a text may have to match more than {MAX_OVERLAP} patterns at once"
        )
    return patterns(schema) / most * 2**most / _OVERLAP_SHARE if most > 1 else 0.0


def _remainders(multiples: set[int], combined: bool) -> int:
    """Return the number of remainders to distinguish. ``combined``: a number may have to be a multiple of all."""
    count, together = sum(multiples), 1
    for multiple in multiples if combined else ():
        together = math.lcm(together, multiple)
        if together > MAX_MULTIPLE:
            break
    if max(count, together) > MAX_MULTIPLE:
        raise ArgumentError(
            f"the JSON schema is too large: its multipleOf have more than {MAX_MULTIPLE:,} remainders to tell apart"
        )
    return max(count, together)


def _values(schema: Any) -> Iterator[tuple[Any, bool]]:
    """Yield every value of a schema, and whether it belongs to an enum. Raises ArgumentError for a schema that is too
    deep."""
    stack = [(schema, False, 0)]
    while stack:
        value, of_enum, depth = stack.pop()
        yield value, of_enum
        if depth > _MAX_DEPTH:
            raise ArgumentError(f"the JSON schema is too large: it is nested more than {_MAX_DEPTH} deep")
        if isinstance(value, dict):
            stack += [(part, name == "enum" and isinstance(part, list), depth + 1) for name, part in value.items()]
        elif isinstance(value, list):
            stack += [(part, of_enum, depth + 1) for part in value]


def _multiple(value: Any) -> set[int]:
    """Return the number of remainders of a multipleOf, without powers of ten."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        return set()
    if value > _LARGEST:
        return {MAX_MULTIPLE + 1}
    digits = Decimal(str(value)).as_tuple().digits
    return {int("".join(map(str, digits)).rstrip("0"))}
