"""A package's chat template: compiled once, rendered per conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2

from ...errors import PackageError, PromptError
from ...untrusted import brief
from .budget import budgeted, size
from .sandbox import MAX_SOURCE, BoundedEnvironment

_MAX_REASON = 300  # characters of an error's message


class ChatTemplate:
    """A compiled Jinja template, from its ``source``. Raises PackageError for invalid Jinja and for templates above the
    limits."""

    def __init__(self, source: str) -> None:
        self.source = source
        if len(source) > MAX_SOURCE:
            raise PackageError(f"The chat template has {len(source):,} characters; {MAX_SOURCE:,} are read.")
        try:
            with budgeted():
                self._template = BoundedEnvironment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {_reason(error)}"
            raise PackageError(f"The chat template is not valid Jinja ({reason}).") from error
        except Exception as error:  # the template may hit any limit of Python's compiler
            raise PackageError(f"The chat template cannot be compiled ({_reason(error)}).") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Render the template. ``variables``: plain values, see `variables.plain`.

        Raises PromptError if the template refuses the messages, PackageError if it fails or exceeds its budget.
        """
        try:
            with budgeted() as budget:
                given = size(dict(variables))
            with budgeted(given) as budget:
                parts = []
                for part in self._template.root_render_func(self._template.new_context(dict(variables))):
                    budget.bytes -= len(part)
                    budget.room(0)
                    parts.append(part)
                return "".join(parts)
        except PromptError:
            raise
        except Exception as error:  # a template is code and can fail in any way
            raise PackageError(f"The chat template of this package failed: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """Describe an error in a few words."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return brief(error, _MAX_REASON).rstrip(".")
