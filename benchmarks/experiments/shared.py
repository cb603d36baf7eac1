"""Imports from the other benchmarks, one folder up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import common
from common import FAINT, INK, machine, table
from templating import render

__all__ = ["FAINT", "INK", "STYLE", "machine", "render", "table", "versions"]

STYLE: dict[str, Any] = {**common.STYLE, "legend.frameon": False, "lines.linewidth": 2}


def versions() -> dict[str, str]:
    """Return the versions of the libraries that train and measure."""
    return common.versions("melt-export", "torch", "transformers", "numpy")
