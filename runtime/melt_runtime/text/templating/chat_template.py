"""A chat template of a package: compiled once, rendered for each conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2

from ...errors import PackageError, PromptError
from ...untrusted import brief
from .budget import budgeted, size
from .sandbox import MAX_SOURCE, BoundedEnvironment

_MAX_REASON = 300  # characters of an error's own words


class ChatTemplate:
    """Jinja source, compiled. Raises PackageError for what is not valid Jinja or more than a template may be."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise PackageError(f"The chat template has {len(source):,} characters; {MAX_SOURCE:,} are read.")
        try:
            with budgeted():
                self._template = BoundedEnvironment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {_reason(error)}"
            raise PackageError(f"The chat template is not valid Jinja ({reason}).") from error
        except Exception as error:  # Python's compiler has limits of its own, and any of them may be met
            raise PackageError(f"The chat template cannot be compiled ({_reason(error)}).") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. variables: plain values, see `variables.plain`.

        Raises PromptError where the template refuses the messages, PackageError where it fails or asks for too much.
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
        except Exception as error:  # a template is code of the package and can fail in any way
            raise PackageError(f"The chat template of this package failed: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """An error in a few words."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return brief(error, _MAX_REASON).rstrip(".")
