"""What a person found out about the figures and no program can say. Everything else in docs/experiments.md is computed.

A note is printed at the end of its section, after the words "Why".
"""

from __future__ import annotations

NOTES: dict[str, str] = {
    "teacher": "",
    "aggregations": "",
    "left_out": "",
    "depth": "",
    "chunks": "",
}
