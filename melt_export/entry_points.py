"""Entry points of the commands that need PyTorch. Where it is missing they say what to install."""

from __future__ import annotations

import sys
from collections.abc import Callable

from melt_runtime.cli.errors import run_app


def _run(command: str, main: Callable[[], None], extra: str = "export") -> None:
    """Run a command, or name the extra to install if a library is missing."""
    try:
        main()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing.startswith("melt_"):
            raise
        advice = f"install it with: pip install 'melt-export[{extra}]'"
        print(f"{command}: {missing} is not installed; {advice}", file=sys.stderr)
        sys.exit(2)


def convert() -> None:
    """Run ``melt-convert``."""
    from melt_models.convert_cli import app

    _run("melt-convert", lambda: run_app(app, "melt-convert", (OSError,)))


def export() -> None:
    """Run ``melt-export``."""
    from .cli import export_main

    _run("melt-export", export_main)


def verify() -> None:
    """Run ``melt-verify``."""
    from .cli import verify_main

    _run("melt-verify", verify_main)


def train() -> None:
    """Run ``melt-train``."""

    def main() -> None:
        from melt_models.training.cli import app  # imports yaml

        run_app(app, "melt-train", (OSError,))

    _run("melt-train", main, "train")
