"""Where the commands that need PyTorch begin: on a device without it they say what to install."""

from __future__ import annotations

import sys
from importlib import import_module


def _start(command: str, module: str, function: str) -> None:
    try:
        main = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("melt_"):
            raise
        advice = "install it with: pip install 'melt-export[export]'"
        print(f"{command}: {error.name} is not installed; {advice}", file=sys.stderr)
        sys.exit(2)
    main()


def convert() -> None:
    """The ``melt-convert`` command."""
    _start("melt-convert", "melt_models.convert", "main")


def export() -> None:
    """The ``melt-export`` command."""
    _start("melt-export", "melt_export.cli", "export_main")


def verify() -> None:
    """The ``melt-verify`` command."""
    _start("melt-verify", "melt_export.cli", "verify_main")
