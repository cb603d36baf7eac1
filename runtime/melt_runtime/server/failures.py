"""Errors in the format that OpenAI's clients expect."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from ..errors import ArgumentError, BusyError, ClosedError, MeltError, PromptError, PromptTooLongError
from .fields import TAG

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error reply: HTTP status, message, the field it concerns, and a code for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        """Return the object {"error": ...}."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def renamed(self, own_field: Callable[[str], str]) -> ApiError:
        """Return the error with the field's name, also at the beginning of the message, as ``own_field`` gives it."""
        if self.param is None:
            return self
        name, message = own_field(self.param), str(self)
        if name == self.param:
            return self
        if message.startswith(self.param):
            message = name + message.removeprefix(self.param)
        error = ApiError(self.status, message, name, self.code)
        error.headers = self.headers
        return error

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def as_api_error(error: MeltError, prompt_field: str | None = None) -> ApiError:
    """Convert a runtime error to an error reply. ``prompt_field``: the request's field with its prompt."""
    if isinstance(error, BusyError):
        busy = ApiError(429, str(error), code="busy")
        busy.headers["Retry-After"] = str(math.ceil(error.retry_after))
        return busy
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), prompt_field, "context_length_exceeded")
    if isinstance(error, ArgumentError | PromptError):
        return ApiError(400, str(error))
    if isinstance(error, ClosedError):
        return ApiError(503, str(error), code="closed")
    return ApiError(500, str(error))


def as_refusal(error: ValidationError) -> ApiError:
    """Convert a schema violation to an error reply about the first wrong field, by its path."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = [str(part) for part in first["loc"] if not str(part).startswith(TAG)]
    context = first.get("ctx", {})
    where = ".".join([*path, *([str(context["field"])] if "field" in context else [])]) or None
    said = "it must be an object" if first["type"] == "model_type" else first["msg"]
    return ApiError(400, f"{where or 'the body'}: {said}", where, str(first["type"]))
