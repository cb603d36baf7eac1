"""The exporter's commands: help and refused arguments without PyTorch, and what to install on a device without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MakeCheckpoint

ADDITION = Path(__file__).parent.parent / "examples" / "addition-melt"
EXPORT = ("--checkpoint", str(ADDITION), "--output", "new")


def run(
    command: str, arguments: tuple[str, ...], before: str = "", after: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, between two statements."""
    script = f"{before}\nimport sys\nsys.argv[1:] = {arguments!r}\nfrom melt_export.entry_points import {command}\n"
    script += f"try: {command}()\nfinally: {after or 'pass'}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_an_output_that_takes_nothing_is_one_line(make_looplm: MakeCheckpoint, tmp_path: Path) -> None:
    full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    result = run("convert", (str(make_looplm()), str(tmp_path / "melt")), before=full)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("melt-convert: [Errno 28] No space left on device")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("convert", ("--help",), ""),
        ("convert", ("--lops", "2"), "No such option: --lops"),
        ("convert", ("missing", "new"), "checkpoint directory missing does not exist"),
        ("convert", (str(ADDITION), str(ADDITION)), "exists and is not empty"),
        ("export", ("--help",), ""),
        ("export", (*EXPORT, "--weights", "int3"), "int3"),
        ("export", (*EXPORT, "--weights", "int4", "--precision", "bf16"), "precision"),
        ("export", ("--checkpoint", "missing", "--output", "new"), "checkpoint directory missing does not exist"),
        ("verify", ("--help",), ""),
        ("verify", ("missing", "--checkpoint", str(ADDITION)), "package missing does not exist"),
        ("train", ("--help",), ""),
        ("train", ("all", "--config", "missing.yaml"), "missing.yaml cannot be read"),
        ("train", ("phase3", "--config", "run.yaml"), "phase3"),
    ],
)
def test_help_and_refused_arguments_do_not_wait_for_pytorch(
    command: str, arguments: tuple[str, ...], said: str
) -> None:
    heavy = {"torch", "transformers", "onnx", "onnxruntime"}
    result = run(command, arguments, after=f"print({heavy} & set(sys.modules))")
    assert result.returncode == (2 if said else 0), result.stderr
    assert said in result.stderr
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("command", "arguments", "library", "extra"),
    [
        ("convert", (str(ADDITION), "new"), "transformers", "export"),
        ("export", EXPORT, "transformers", "export"),
        ("export", EXPORT, "onnx_ir", "export"),
        ("train", ("all", "--config", "run.yaml"), "accelerate", "train"),
        ("train", ("all", "--config", "run.yaml"), "yaml", "train"),
    ],
)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    command: str, arguments: tuple[str, ...], library: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("output: out")
    result = run(command, arguments, before=f"import sys; sys.modules['{library}'] = None")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"melt-{command}: {library} is not installed")
    assert f"melt-export[{extra}]" in result.stderr
