"""How many patterns of a JSON schema one text may have to match at the same time. Each more doubles the cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

_DATA = {"enum", "const", "default", "examples"}  # keywords without schemas
_DEFINITIONS = {"$defs", "definitions"}  # keywords counted where they are referred to
_NAMED = {"properties", "patternProperties", "dependentSchemas"}  # keywords with schemas by name
_CHOICES = {"anyOf", "oneOf"}
_REFERENCES = {"$ref", "$dynamicRef"}
_PATTERNS = {"pattern", "format"}
_DEEPEST = 300  # nesting depth, references followed; deeper parts count as overlapping everything


class _Overlap(NamedTuple):
    """The most patterns that apply at the same time: ``here`` to the value itself, ``below`` to one of its parts."""

    here: int = 0
    below: int = 0

    @property
    def most(self) -> int:
        return max(self)

    def __add__(self, other: object) -> _Overlap:
        """Combine two overlaps that both apply to a value."""
        assert isinstance(other, _Overlap)
        return _Overlap(self.here + other.here, self.below + other.below)


def patterns(schema: Any) -> int:
    """Return the number of patterns and formats in a schema."""
    return sum(isinstance(one.get(name), str) for one in _objects(schema) for name in _PATTERNS)


def overlap(schema: Any) -> int:
    """Return the most patterns that one text may have to match at the same time.

    These are all patterns of an ``allOf`` and of referenced schemas, and those of the largest branch of each choice.
    """
    return _Search(schema).at(schema, 0).most


class _Search:
    def __init__(self, schema: Any):
        self._schema, self._all = schema, patterns(schema)
        self._known: dict[str, _Overlap] = {}

    def at(self, value: Any, depth: int) -> _Overlap:
        """Return the overlap of a schema."""
        if depth > _DEEPEST:
            return _Overlap(self._all, self._all)
        if isinstance(value, list):
            return _Overlap(0, self._largest(value, depth))
        if not isinstance(value, dict):
            return _Overlap()
        found = _Overlap(sum(isinstance(value.get(name), str) for name in _PATTERNS))
        for name, part in value.items():
            if name in _REFERENCES and isinstance(part, str):
                found += self._referred(part, depth)
            elif name == "allOf" and isinstance(part, list):
                found = sum((self.at(one, depth + 1) for one in part), found)
            elif name in _CHOICES and isinstance(part, list):
                branches = [self.at(one, depth + 1) for one in part]
                here, below = (max((one[at] for one in branches), default=0) for at in (0, 1))
                found += _Overlap(here, below)
            elif name in _NAMED and isinstance(part, dict):
                found += _Overlap(0, self._largest(part.values(), depth))
            elif name not in _DATA | _DEFINITIONS and isinstance(part, dict | list):
                found += _Overlap(0, self.at(part, depth + 1).most)
        return found

    def _largest(self, values: Iterable[Any], depth: int) -> int:
        return max((self.at(one, depth + 1).most for one in values), default=0)

    def _referred(self, reference: str, depth: int) -> _Overlap:
        if reference not in self._known:
            self._known[reference] = _Overlap()  # a cyclic reference adds nothing
            there, target = _resolve(self._schema, reference)
            self._known[reference] = self.at(target, depth + 1) if there else _Overlap(self._all, self._all)
        return self._known[reference]


def _resolve(schema: Any, reference: str) -> tuple[bool, Any]:
    """Return whether a reference is a path in the schema, and its target."""
    if not (reference == "#" or reference.startswith("#/")):
        return False, None
    for name in reference.split("/")[1:]:
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict) and name in schema:
            schema = schema[name]
        elif isinstance(schema, list) and name.isdecimal() and len(name) < 6 and int(name) < len(schema):
            schema = schema[int(name)]
        else:
            return False, None
    return True, schema


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a schema."""
    stack = [schema]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield value
            stack += value.values()
        elif isinstance(value, list):
            stack += value
