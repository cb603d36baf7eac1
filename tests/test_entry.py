"""On a device without PyTorch the exporter's commands say what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "library", "extra"),
    [
        ("convert", "transformers", "export"),
        ("export", "transformers", "export"),
        ("verify", "transformers", "export"),
        ("train", "accelerate", "train"),
    ],
)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(command: str, library: str, extra: str) -> None:
    script = f"import sys; sys.modules['{library}'] = None; from melt_export.entry import {command}; {command}()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"melt-{command}: {library} is not installed")
    assert f"melt-export[{extra}]" in result.stderr
