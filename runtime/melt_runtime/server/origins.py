"""Answers that web pages of other origins may read (CORS)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ..errors import ArgumentError

_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]{1,5})?")
_SEEN_BY_PAGES = ("X-Request-Id", "Retry-After")  # headers of answers


def check_origins(given: Iterable[str]) -> tuple[str, ...]:
    """Return the origins as browsers send them. Raises ArgumentError for anything else, such as a path or "*"."""
    origins = tuple(one.strip().lower() for one in given)
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ArgumentError(
                f"{origin[:100]!r} is no origin; give scheme, host and port exactly, such as https://chat.example.org "
                "or http://localhost:3000"
            )
    return origins


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Let web pages of these origins call the server and read its answers, refusals included."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's client for browsers sends headers of its own
        allow_private_network=True,
        expose_headers=_SEEN_BY_PAGES,
    )
