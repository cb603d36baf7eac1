"""Mutations of good inputs: values that break readers, missing and duplicate fields, changed bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st
from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_TESTS

Mutate = Callable[[list[bytes]], st.SearchStrategy[bytes]]

# Placeholders for text that json.dumps cannot write; it is inserted afterwards.
_RAW = {
    '"@digits@"': "9" * 5000,
    '"@many@"': "9" * 400,
    '"@exponent@"': "1e999",
    '"@deep@"': "[" * 50_000 + "]" * 50_000,
    '"@objects@"': '{"a":' * 900 + "1" + "}" * 900,
    '"@surrogate@"': '"\\ud800"',
}
HOSTILE: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    10**30,
    0.5,
    -0.0,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "a",
    "batch",
    "chunk",
    "context",
    "float16",
    "int64",
    "swap",
    "read_only",
    "per_loop",
    "hidden",
    "key_cache.0",
    "../../etc/passwd",
    "/dev/zero",
    "weights.data",
    "a\0b",
    "\x1b[2J\x1b]0;x\x07",
    "\u202egnp.exe",
    "é" * 300,
    "x" * 100_000,
    "{{ 1 }}",
    [],
    {},
    [[]],
    [1, 2, 3],
    ["batch", "chunk", 64],
    {"a": 1},
    *(json.loads(name) for name in _RAW),
]


@st.composite
def json_documents(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Draw a document with up to three changes, and sometimes a changed byte."""
    document = json.loads(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        _change(draw, document)
    text = json.dumps(document)
    for name, raw in _RAW.items():
        text = text.replace(name, raw)
    content = text.encode()
    return draw(bytes_of([content])) if draw(st.integers(0, 15)) == 15 else content


# Operands of template expressions, many of them large or of an unexpected type.
_VALUES = (
    "'a'",
    "''",
    "1",
    "-1",
    "0",
    "2.5",
    "none",
    "true",
    "10**9",
    "100000",
    "messages",
    "messages[0].content",
    "x.y",
    "range(100000)",
    "range(9)",
    "('a' * 100000)",
    "('\\n' * 100000)",
    "([1] * 100000)",
    "ns.a",
    "ns",
    "loop",
    "{'k': 1}",
    "(1, 'b')",
    "('%s' * 1000)",
    "'{:>9}'",
    "'%9d'",
    "('<b>' | safe)",
    "(messages | map(attribute='role'))",
    "m",
    "self",
)
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or", "is in", "is eq")
_METHODS = tuple(name for kind in (str, list, dict, int, bytes) for name in dir(kind) if not name.startswith("_"))
_STATEMENTS = (
    "{{% set ns.a = {} %}}",
    "{{{{ {} }}}}",
    "{{% for m in {} %}}{}{{% endfor %}}",
    "{{% if {} %}}{}{{% endif %}}",
    "{{% set ns.a = [ns.a, {}] %}}",
    "{{% set ns.a = ns.a ~ {} %}}",
    "{{% for m in {} if {} %}}{{{{ m }}}}{{% endfor %}}",
    "{{% macro f(m) %}}{}{{% endmacro %}}{{{{ f({}) }}}}",
    "{{% set v %}}{}{{% endset %}}",
    "{{% filter upper %}}{}{{% endfilter %}}",
    "{{% for m in {} recursive %}}{{{{ loop({}) }}}}{{% endfor %}}",
    "{{% call(m) f({}) %}}{}{{% endcall %}}",
    "{{% for i in range(60) %}}{{% set ns.a = ns.a + ns.a %}}{{% endfor %}}{}",
    "{{% generation %}}{}{{% endgeneration %}}",
)


def templates(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Draw templates of random statements, or the seeds with changed bytes."""
    filters, tests = (st.sampled_from(sorted(table)) for table in (DEFAULT_FILTERS, DEFAULT_TESTS))
    expressions = st.recursive(
        st.sampled_from(_VALUES),
        lambda inner: st.one_of(
            st.builds("({} {} {})".format, inner, st.sampled_from(_OPERATORS), inner),
            st.builds("({} | {})".format, inner, filters),
            st.builds("({} | {}({}))".format, inner, filters, inner),
            st.builds("({} | {}({}, {}))".format, inner, filters, inner, inner),
            st.builds("({} | map('{}', {}) | list)".format, inner, filters, inner),
            st.builds("({} is {})".format, inner, tests),
            st.builds("{}.{}({})".format, inner, st.sampled_from(_METHODS), inner),
            st.builds("{}.{}({}, {})".format, inner, st.sampled_from(_METHODS), inner, inner),
            st.builds("{}[{}:{}]".format, inner, inner, inner),
            st.builds("{}[{}]".format, inner, inner),
        ),
        max_leaves=6,
    )
    statements = st.recursive(
        st.builds("{{{{ {} }}}}".format, expressions),
        lambda inner: st.builds(
            lambda form, first, second: form.format(first, second), st.sampled_from(_STATEMENTS), expressions, inner
        ),
        max_leaves=4,
    )
    made = st.lists(statements, min_size=1, max_size=4).map(
        lambda parts: ("{% set ns = namespace(a='a') %}" + "".join(parts)).encode()
    )
    return st.one_of(made, made, made, bytes_of(seeds))


@st.composite
def bytes_of(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Draw an input with bytes changed, cut, repeated or inserted."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.sampled_from(["turn", "set", "cut", "drop", "double", "insert"])):
            case "turn" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if content:
                content[at] = draw(st.sampled_from([0, 1, 127, 128, 255]))
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + draw(st.integers(1, 64))]
            case "double":
                content[at:at] = content[at : at + draw(st.integers(1, 64))]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=16))
    return bytes(content)


@st.composite
def named_files(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Draw a file, named in its first line, changed as JSON."""
    name, _, content = draw(st.sampled_from(seeds)).partition(b"\n")
    return name + b"\n" + draw(json_documents([content]))


def _change(draw: st.DrawFn, document: Any) -> None:
    """Make one change in a document, in place. Inserted values are copies, because the next change may alter them."""
    places = list(_places(document))
    if not places:
        return
    holder, key = draw(st.sampled_from(places))
    match draw(st.sampled_from(["replace", "replace", "nudge", "drop", "copy", "double", "rename"])):
        case "replace":
            holder[key] = deepcopy(draw(st.sampled_from(HOSTILE)))
        case "nudge" if isinstance(holder[key], int):
            holder[key] = draw(st.sampled_from([holder[key] + 1, holder[key] - 1, 2 * holder[key], -holder[key]]))
        case "drop":
            del holder[key]
        case "copy":
            other, of = draw(st.sampled_from(places))
            if (isinstance(other, dict) and of in other) or (isinstance(other, list) and int(of) < len(other)):
                holder[key] = json.loads(json.dumps(other[of]))
        case "double" if isinstance(holder, list):
            holder.insert(int(key), holder[key])
        case "rename" if isinstance(holder, dict):
            holder[draw(st.sampled_from([value for value in HOSTILE if isinstance(value, str)]))] = holder.pop(key)
        case _:
            holder[key] = deepcopy(draw(st.sampled_from(HOSTILE)))


def _places(value: Any) -> Any:
    """Yield (holder, key) of every value in a document."""
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            yield holder, key
            waiting.append(holder[key])
