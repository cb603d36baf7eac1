"""Logging as one JSON object per line on standard error."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

LOGGER = logging.getLogger("melt_runtime.server")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def configure() -> None:
    """Route the server's lines, and warnings and errors of uvicorn and asyncio, to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    others = (logging.getLogger(name) for name in ("uvicorn", "asyncio"))
    for logger, level in ((LOGGER, logging.INFO), *((other, logging.WARNING) for other in others)):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def log(event: str, **facts: Any) -> None:
    """Write a line."""
    LOGGER.info(event, extra={"facts": facts})
