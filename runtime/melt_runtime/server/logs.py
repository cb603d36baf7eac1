"""Logging on standard error, one line per event: as JSON, or as text for people."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from ..untrusted import printable

LOGGER = logging.getLogger("melt_runtime.server")
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


class _TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {}).items()
        words = [f"{name}={value if _is_plain(value) else json.dumps(value)}" for name, value in facts]
        line = printable(" ".join((_time(record), record.levelname, record.getMessage(), *words)))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


FORMATS: dict[str, type[logging.Formatter]] = {"json": _JsonLines, "text": _TextLines}


def configure(level: str = "info", layout: str = "json") -> None:
    """Route the server's lines, and warnings and errors of uvicorn and asyncio, to standard error.

    ``level``: the least of LEVELS that is written. ``layout``: one of FORMATS.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATS[layout]())
    least = LEVELS[level]
    others = (logging.getLogger(name) for name in ("uvicorn", "asyncio"))
    for logger, own in ((LOGGER, least), *((other, max(least, logging.WARNING)) for other in others)):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(own)


def log(event: str, level: int = logging.INFO, /, **facts: Any) -> None:
    """Write a line."""
    LOGGER.log(level, event, extra={"facts": facts})


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _is_plain(value: object) -> bool:
    """Return whether a value is one word, and so needs no quotes."""
    text = str(value)
    return not isinstance(value, dict | list) and bool(text) and not any(c.isspace() or c in '"=' for c in text)
