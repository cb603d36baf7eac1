"""A Jinja sandbox that counts every step.

The syntax tree counts its own work (`metering`); filters, tests, operators and calls count theirs here.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
from jinja2.runtime import Context, Macro
from markupsafe import EscapeFormatter, Markup

from ...errors import PromptError
from .budget import TooMuch, current, size
from .costs import (
    ATTRIBUTES,
    DEEP_TESTS,
    FILTERS,
    METHODS,
    SAFE_METHODS,
    SEARCHES,
    SHALLOW_FILTERS,
    SQUARE_FILTERS,
    WHOLE_FILTERS,
    check_attribute,
    check_spec,
    printf,
    width,
)
from .metering import BLOCK, FILTERS_THAT_PAY, metered

MAX_SOURCE = 256 << 10  # characters; the longest templates of today have 30,000
_MAX_LAZY = 50  # chained filters that read each other item by item
_MAX_REFUSAL = 1000  # characters of a template's own error message


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A Jinja environment that renders like transformers', within `budget.current`."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols], cache_size=0
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: _bounded_test(name, function) for name, function in tests.items()}
        self.filters |= FILTERS_THAT_PAY
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_Dict(),
            namespace=_Namespace,
            lipsum=_lipsum,
        )

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(metered(source), *args, **kwargs)

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """Join the output of a macro or block."""
        parts = list(parts)
        current().room(sum(map(len, parts)))
        text: str = current().made("".join(parts))
        return text

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator. Raises TooMuch if the result would be too large."""
        budget = current()
        if operator == "%" and isinstance(left, str | bytes):
            budget.read(left, right)
            budget.room(printf(left, right))
        elif operator == "**":
            _check_power(left, right)
        elif operator == "*":
            _check_times(left, right)
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            budget.room(_length(left) + _length(right))
        elif operator == "-":
            budget.read(left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method. Raises TooMuch if no template needs it or the result would be too large."""
        budget = current()
        budget.spend(BLOCK)
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, Macro):
            budget.spend(len(args) + len(kwargs))
            return super().call(__context, __obj, *args, **kwargs)
        if isinstance(owner, str):
            args = _check_method(owner, __obj.__name__, args, kwargs)
        elif isinstance(__obj, types.BuiltinFunctionType | types.MethodWrapperType):
            _check_builtin(owner, __obj.__name__, args)
        else:
            budget.read(args)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(owner, dict) else budget.made(result)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item. Keys other than text and integers are counted, because hashing reads them whole."""
        if not isinstance(argument, str | int):
            current().read(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Wrap ``str.format`` as Jinja does, with bounded field widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text: str = value.__self__
        mapping = value.__name__ == "format_map"
        formatter = _MarkupFormatter(self, escape=text.escape) if isinstance(text, Markup) else _Formatter(self)

        def bounded(*args: Any, **kwargs: Any) -> str:
            if mapping and (kwargs or len(args) != 1):
                raise TypeError("format_map() takes exactly one argument")
            return type(text)(formatter.vformat(text, () if mapping else args, args[0] if mapping else kwargs))

        return bounded


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    """A `str.format` that counts every field."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion:
            current().room(2 * current().read(value))
        return current().made(super().convert_field(value, conversion))

    def format_field(self, value: Any, format_spec: str) -> str:
        check_spec(format_spec)
        current().room(current().read(value))
        text: str = current().made(super().format_field(value, format_spec))
        return text


class _MarkupFormatter(_Formatter, EscapeFormatter):
    """The same for markup-safe text."""


class _GenerationBlock(jinja2.ext.Extension):
    """The `{% generation %}` block, which marks text for training; its content is rendered unchanged."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` for templates: callable, with `fromkeys`, without access to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Call dict.fromkeys."""
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without underscore names, whose text does not show its contents."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace cannot hold {name[:40]!r}, which begins with an underscore")


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter to count what it reads, and check what it makes before it does."""
    passed = getattr(function, "jinja_pass_arg", None) is not None
    forecast = FILTERS.get(name)

    @functools.wraps(function)
    def bounded(*given: Any, **kwargs: Any) -> Any:
        budget = current()
        first, (value, *args) = given[:passed], given[passed:]
        if name in WHOLE_FILTERS and not hasattr(value, "__len__"):
            value = list(_counted(iter(value)))
        shallow = name in SHALLOW_FILTERS and not isinstance(value, str)
        budget.spend(BLOCK)
        if name in ATTRIBUTES:
            check_attribute(*args[ATTRIBUTES[name] :][:1], *(kwargs[key] for key in ("attribute",) if key in kwargs))
        if shallow:
            if name not in ("default", "d"):
                budget.read(args, kwargs)
        else:
            length = budget.read(value, args, kwargs)
            if name in SQUARE_FILTERS:
                budget.spend(length * length >> 12)
        if forecast is not None:
            budget.room(forecast(value, *args, **kwargs))
        result = function(*first, value, *args, **kwargs)
        if isinstance(result, Iterator):
            return _Lazy(result, value, *args, *kwargs.values())
        return result if shallow else budget.made(result)

    return bounded


def _bounded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = getattr(function, "jinja_pass_arg", None) is not None

    @functools.wraps(function)
    def bounded(*given: Any, **kwargs: Any) -> Any:
        current().spend(BLOCK)
        if name in DEEP_TESTS:
            current().read(given[passed:], kwargs)
        return function(*given, **kwargs)

    return bounded


class _Lazy:
    """A lazy filter's items, counted as they come.

    Each item waits in C for the filter that it reads from, so the length of chains is bounded. ``behind``: what this
    filter reads.
    """

    def __init__(self, items: Iterator[Any], *behind: Any) -> None:
        self.depth: int = 1 + max((one.depth for one in (items, *behind) if isinstance(one, _Lazy)), default=0)
        if self.depth > _MAX_LAZY:
            raise TooMuch(f"it chains more than {_MAX_LAZY} filters")
        self._items = _counted(items)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._items)


def _counted(parts: Iterator[Any]) -> Iterator[Any]:
    for part in parts:
        current().spend(BLOCK)
        yield current().made(part) if isinstance(part, list) else part


def _check_builtin(owner: Any, name: str, args: tuple[Any, ...]) -> None:
    """Count a method call on a built-in type. Raises TooMuch for methods that no template needs."""
    allowed = next((names for kind, names in SAFE_METHODS.items() if isinstance(owner, kind)), frozenset())
    if name not in allowed:
        raise TooMuch(f"it calls {type(owner).__name__}.{name}")
    current().read(args)
    if isinstance(owner, list | tuple | range) and args:
        current().read(owner)


def _check_method(text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Count a method call on a text. Return its arguments, with an iterator turned into a list."""
    budget = current()
    if name == "join" and args and not hasattr(args[0], "__len__"):
        args = (list(_counted(iter(args[0]))), *args[1:])
    named = {key: value for key, value in kwargs.items() if not key.startswith("_")}
    budget.read(text, args, named)
    if name in SEARCHES:
        budget.spend(len(text) * max((len(one) for one in args if isinstance(one, str)), default=1) >> 10)
    if name in METHODS:
        budget.room(METHODS[name](text, *args, **named))
    return args


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0 and base.bit_length() * exponent > 256:
        raise TooMuch("it makes a number of more than 64 bits")


def _check_times(left: Any, right: Any) -> None:
    for one, count in ((left, right), (right, left)):
        if isinstance(one, str | bytes | list | tuple) and isinstance(count, int):
            current().room(_length(one) * max(count, 0))


def _length(value: Any) -> int:
    """Estimate the bytes of a sequence, without its items."""
    return len(value) if isinstance(value, str | bytes) else 8 * len(value)


def _raise_exception(message: Any) -> NoReturn:
    text = str(message) if size(message) <= _MAX_REFUSAL else f"{str(message)[:_MAX_REFUSAL]}..."
    raise PromptError(f"The chat template refuses these messages: {text}")


def _strftime_now(form: str) -> str:
    if size(form) > _MAX_REFUSAL:
        raise TooMuch(f"it asks for a date of more than {_MAX_REFUSAL:,} characters")
    return datetime.now().strftime(form)


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    if width(n) * width(max) > 10_000:
        raise TooMuch("it asks for more than 10,000 words")
    return jinja2.utils.generate_lorem_ipsum(n, html, min, max)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes <, > and & for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
