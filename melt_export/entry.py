"""Where the commands that need PyTorch begin: on a device without it they say what to install."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from melt_runtime.command import run_app


def _load(command: str, module: str, extra: str = "export") -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("melt_"):
            raise
        advice = f"install it with: pip install 'melt-export[{extra}]'"
        print(f"{command}: {error.name} is not installed; {advice}", file=sys.stderr)
        sys.exit(2)


def convert() -> None:
    """The ``melt-convert`` command."""
    run_app(_load("melt-convert", "melt_models.convert").app, "melt-convert")


def export() -> None:
    """The ``melt-export`` command."""
    _load("melt-export", "melt_export.cli").export_main()


def verify() -> None:
    """The ``melt-verify`` command."""
    _load("melt-verify", "melt_export.cli").verify_main()


def train() -> None:
    """The ``melt-train`` command."""
    run_app(_load("melt-train", "melt_models.training.cli", "train").app, "melt-train")
