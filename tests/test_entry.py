"""On a device without PyTorch the exporter's commands say what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["convert", "export", "verify"])
def test_a_missing_library_is_named_with_the_extra_that_brings_it(command: str) -> None:
    script = f"import sys; sys.modules['transformers'] = None; from melt_export.entry import {command}; {command}()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"melt-{command}: transformers is not installed")
    assert "melt-export[export]" in result.stderr
