"""The page for people at /: one document put together from the files in web/, and what it may do in a browser."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse

from ..package.manifest import Manifest

_SCRIPTS = ("server.js", "markdown.js", "chats.js", "memory.js", "answers.js", "page.js")


def add_page(app: FastAPI) -> None:
    """Add the page."""
    style, script = _text("style.css"), "\n".join(map(_text, _SCRIPTS))
    page = _text("page.html").replace("/* style */", style).replace("/* script */", script)
    # It may connect to this server only, run only its own script, and must not be framed.
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers=headers)


def memory(manifest: Manifest) -> dict[str, Any]:
    """Return the bytes of the state of one conversation: what it takes, what it takes with a single loop, and with a
    cache per loop. ``shared``: whether all loops share their caches, as MELT's do."""
    per_loop = manifest.cache_bytes_per_loop(manifest.cache_rows)
    one_loop = manifest.state_bytes() - per_loop * ((manifest.cache_loops or 1) - 1)
    return {
        "state_bytes": manifest.state_bytes(),
        "one_loop_bytes": one_loop,
        "cache_per_loop_bytes": one_loop + per_loop * (manifest.loops - 1),
        "shared": manifest.cache_loops is None,
    }


def _text(name: str) -> str:
    return files(__package__).joinpath("web", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the source of a Content-Security-Policy that allows exactly this inline text."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
