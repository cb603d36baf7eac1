"""The costs of methods and filters whose results can be far larger than their inputs, or slower than they look.

A forecast takes the call's arguments and returns the most characters that can result. It raises TooMuch for requests
that no template needs, and whatever the call would raise for arguments of wrong types.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .budget import TooMuch, size

Forecast = Callable[..., int]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MAX_WIDTH = 100_000  # of a field or an indentation, or in digits
_LINE_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_SPACES = "".join(character for character in map(chr, range(0x3001)) if character.isspace())
_MAX_ATTRIBUTE = 200  # characters: "a.b.c", or "a,b,c" to sort by
_PIECE = 80  # bytes of a short string's object in a list
_ESCAPED = 6  # most characters per character when escaped for HTML, JSON or Python (12 beyond U+FFFF)
_BREAKS = "-({[<"  # characters after which ``title`` begins a word
# A field: name, width and precision. Python allows brackets in names; here they are refused.
_PERCENT = re.compile(r"%(\()?(?:(?<=\()[^()]{0,200}(\)))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?[hlL]*(?:.|\Z)", re.DOTALL)


def width(value: Any) -> int:
    """Return a width that a template asks for. Raises TooMuch."""
    if isinstance(value, int) and abs(value) > MAX_WIDTH:
        raise TooMuch(f"it asks for a width of more than {MAX_WIDTH:,}")
    return abs(int(value))


def printf(form: str | bytes, arguments: Any) -> int:
    """Return the most characters of ``form % arguments``. Raises TooMuch."""
    text = form if isinstance(form, str) else form.decode("latin-1")
    fields = 0
    total = len(text)
    for found in _PERCENT.finditer(text):
        fields += 1
        opened, closed, *numbers = found.groups()
        if opened and not closed:
            raise TooMuch("it formats by a name that is long or has brackets")
        for number in numbers:
            if number == "*":  # a width among the arguments
                total += sum(width(one) for one in arguments if isinstance(one, int))
            elif number:
                total += width(int(number[:20]))
    # A tuple's values are used once each; named values as often as they are named.
    times = 1 if isinstance(arguments, tuple) else max(fields, 1)
    return total + _ESCAPED * times * size(arguments)


def check_spec(spec: str) -> None:
    """Check the widths in a format spec such as ">10". Raises TooMuch."""
    for number in re.findall(r"\d+", spec):
        width(int(number[:20]))


def check_attribute(*names: Any) -> None:
    """Check the attribute names that a filter looks up in every item. Raises TooMuch."""
    if any(isinstance(name, str) and len(name) > _MAX_ATTRIBUTE for name in names):
        raise TooMuch(f"it asks for an attribute of more than {_MAX_ATTRIBUTE} characters")


def _padded(text: Any, to: Any = 80, *rest: Any, **named: Any) -> int:
    return size(text) + width(named.get("width", to))


def _replaced(text: Any, old: Any, new: Any, *rest: Any, **named: Any) -> int:
    old, new = str(old), str(new)
    text = str(text)
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _tabs(text: str, tabsize: Any = 8) -> int:
    return len(text) + text.count("\t") * width(tabsize)


def _translated(text: str, table: Any) -> int:
    longest = max(map(size, table.values()), default=1) if isinstance(table, Mapping) else 1
    return len(text) * max(longest, 1)


def _lines(text: str, *rest: Any, **named: Any) -> int:
    return len(text) + _PIECE * sum(map(text.count, _LINE_BREAKS))


def _split(text: str, sep: Any = None, *rest: Any, **named: Any) -> int:
    sep = named.get("sep", sep)
    pieces = text.count(sep) if sep else sum(map(text.count, _SPACES))
    return len(text) + _PIECE * (pieces + 1)


def _encoded(text: str, encoding: str = "utf-8", *rest: Any) -> int:
    if not re.fullmatch(r"(?i)utf[-_]?8|ascii|latin[-_]?1", encoding):
        raise TooMuch(f"it asks for the encoding {encoding[:40]!r}")
    return 4 * len(text)


def _joined(between: str, parts: Any) -> int:
    return _ESCAPED * (size(parts) + len(between) * len(parts))


METHODS: dict[str, Forecast] = {
    "center": _padded,
    "ljust": _padded,
    "rjust": _padded,
    "zfill": _padded,
    "expandtabs": _tabs,
    "replace": _replaced,
    "translate": _translated,
    "splitlines": _lines,
    "split": _split,
    "rsplit": _split,
    "encode": _encoded,
    "join": _joined,
}


def _join(parts: Any, d: Any = "", attribute: Any = None) -> int:
    return _ESCAPED * (size(parts) + size(d) * len(parts))


def _indented(text: Any, width_: Any = 4, first: Any = False, blank: Any = False, **named: Any) -> int:
    by = named.get("width", width_)
    text = str(text)
    each = size(by) if isinstance(by, str) else width(by)
    return len(text) + (each + 1) * (2 + sum(map(text.count, _LINE_BREAKS)))


def _wrapped(text: str, width_: Any = 79, *rest: Any, **named: Any) -> int:
    each = width(named.get("width", width_))
    return (len(text) + 1) * (
        2 + max((size(one) for one in (*rest, *named.values()) if isinstance(one, str)), default=1)
    ) + each


def _cut(text: str, *rest: Any, **named: Any) -> int:
    return len(text) + sum(size(one) for one in (*rest, *named.values()))


def _json(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> int:
    text = size(value)
    parts = text // 12 + 1
    total = 2 * _ESCAPED * text + parts * sum(map(len, separators or ()))
    if indent is not None:
        total += parts * _depth(value) * (len(indent) if isinstance(indent, str) else width(indent))
    return total


def _depth(value: Any) -> int:
    """Return the nesting depth of lists and objects, up to 100."""
    depth, level = 0, [value]
    while level and depth < 100:
        depth += 1
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(v for v in one.values() if isinstance(v, dict | list | tuple))
            elif isinstance(one, list | tuple):
                inner.extend(v for v in one if isinstance(v, dict | list | tuple))
        level = inner
    return depth


def _format(form: Any, *args: Any, **named: Any) -> int:
    return printf(str(form), named or args)


def _batched(value: Any, linecount: Any, fill_with: Any = None) -> int:
    return 8 * width(linecount)


def _sliced(value: Any, slices: Any, fill_with: Any = None) -> int:
    return 64 * width(slices)


def _rounded(value: Any, precision: Any = 0, method: Any = "common") -> int:
    if abs(int(precision)) > 300:
        raise TooMuch("it rounds to more than 300 digits")
    return 0


def _summed(parts: Any, attribute: Any = None, start: Any = 0) -> int:
    # Summing lists copies the partial sum for each list.
    return 0 if isinstance(start, int | float) else 8 * size(parts) * len(parts)


def _listed(value: Any) -> int:
    return _PIECE * len(value) if isinstance(value, str) else 8 * size(value)


def _escaped(value: Any, *rest: Any, **named: Any) -> int:
    return 2 * _ESCAPED * size(value)


def _words(text: Any, *rest: Any, **named: Any) -> int:
    text = str(text)
    return 2 * len(text) + _PIECE * sum(map(text.count, _SPACES + _BREAKS))


FILTERS: dict[str, Forecast] = {
    "title": _words,
    "wordcount": _words,
    "striptags": _words,
    "center": _padded,
    "indent": _indented,
    "replace": _replaced,
    "join": _join,
    "format": _format,
    "wordwrap": _wrapped,
    "truncate": _cut,
    "tojson": _json,
    "batch": _batched,
    "slice": _sliced,
    "round": _rounded,
    "sum": _summed,
    "list": _listed,
    "escape": _escaped,
    "e": _escaped,
    "forceescape": _escaped,
    "urlencode": _escaped,
    "xmlattr": _escaped,
    "urlize": _escaped,
}
# The position of the attribute's name among the arguments.
ATTRIBUTES = {
    "map": 99,  # as a keyword only
    "selectattr": 0,
    "rejectattr": 0,
    "groupby": 0,
    "sum": 0,
    "join": 1,
    "unique": 1,
    "min": 1,
    "max": 1,
    "sort": 2,
}
# These read only a value's length, and its items one at a time.
SHALLOW_FILTERS = _names(
    "attr batch count d default first items last length map reject rejectattr reverse round safe select "
    "selectattr slice"
)
# These consume an iterator before they begin.
WHOLE_FILTERS = _names("join sum list sort unique min max groupby")
# These take quadratic time on adversarial text.
SQUARE_FILTERS = _names("wordwrap urlize striptags pprint")
# These search a text, in the worst case with a full comparison at every place.
SEARCHES = _names("find rfind index rindex count split rsplit partition rpartition replace startswith endswith")
DEEP_TESTS = _names("eq equalto == ne != lt lessthan < le <= gt greaterthan > ge >= in lower upper")
SAFE_METHODS: dict[type, frozenset[str]] = {
    list: frozenset(("index", "count", "copy")),
    tuple: frozenset(("index", "count")),
    range: frozenset(("index", "count")),
    dict: frozenset(("get", "items", "keys", "values", "copy")),
    int: frozenset(("bit_length", "bit_count", "conjugate", "is_integer")),
    float: frozenset(("is_integer", "conjugate", "hex")),
}
