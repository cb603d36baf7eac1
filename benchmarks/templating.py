"""Renders the templates of benchmarks/templates, Markdown with Jinja, from the values of docs/*.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from common import clock, human, plural, table


def middle(values: dict[str, Any], unit: float = 1.0, digits: int = 2) -> str:
    """Format the median and the quartiles in a unit: "1.23 (1.20 to 1.31)"."""
    low, median, high = (f"{values[name] / unit:.{digits}f}" for name in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "clock": clock,
        "counts": lambda found: ", ".join(f"{count:,} {name}" for name, count in found.items()),
        "human": human,
        "middle": middle,
        "ms": lambda seconds: f"{seconds * 1e3:.1f}",
        "plural": plural,
        "spec": format,  # {{ 1234.5 | spec(",.0f") }}: Python's format specifications
        "table": lambda rows, *head: table(list(head), rows),
    }
    return environment


_ENVIRONMENT = _environment()


def render(template: str, /, **values: Any) -> str:
    """Render ``templates/{template}``. Raises jinja2.UndefinedError where it uses a value that is not given."""
    return _ENVIRONMENT.get_template(template).render(**values)
