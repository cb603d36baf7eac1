"""This code beside another commit's package and runtime. Mechanics only: nothing depends on time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import MakeCheckpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import compare_commit
from common import loaded_machine, versions
from compare_settings import QUICK, Settings
from rivals import other_tree
from rivals.other_tree import ROOT, TreeRival
from rivals.turns import take_turns
from templating import render

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")


def _quiet(*_: object) -> None:
    pass


@needs_git
def test_a_commit_and_this_code_take_turns_with_a_package_of_their_own(tmp_path: Path) -> None:
    settings = Settings(**{**QUICK, "rounds": 1, "threads": 1, "busy": (), "tokens": 2})
    report = compare_commit.compare(tmp_path, "HEAD", settings, 10, _quiet)
    other = f"commit {report['commit']}"
    assert list(report["turns"]["0"]) == ["this code", other]
    assert report["turns"]["0"][other]["token_s"]["median"] > 0
    assert report["weights_bytes"]["this code"] == report["weights_bytes"][other] > 0
    about = {"machine": loaded_machine(), "versions": versions("onnxruntime"), "date": "today", "command": "python x"}
    shown = {"layers": 1, "hidden": 256, "loops": 2, "threads": 1, "export": "--weights int4"}
    text = render("commit.md.j2", section={**report, **about, "settings": shown})
    assert f"with commit {report['commit']}, each with its own package" in text
    assert f"| {other} |" in text


@needs_git
def test_a_commit_that_git_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"git: fatal: Needed a single revision"):
        compare_commit.compare(tmp_path, "no-such-commit", Settings(**QUICK), 10, _quiet)


def test_a_tree_runs_its_own_code(tmp_path: Path) -> None:
    """The export that its pyproject.toml names, and the runtime that lies in it."""
    (tmp_path / "pyproject.toml").write_text('[project.scripts]\nmelt-export = "mine:go"\n')
    (tmp_path / "mine.py").write_text("import sys\ndef go(): sys.exit('my own exporter')\n")
    with pytest.raises(RuntimeError, match="my own exporter"):
        other_tree.export(tmp_path, tmp_path, tmp_path / "out")
    (tmp_path / "runtime" / "melt_runtime").mkdir(parents=True)
    (tmp_path / "runtime" / "melt_runtime" / "__init__.py").write_text("raise OSError('my own runtime')\n")
    rival = TreeRival("mine", tmp_path, tmp_path, 1, 1, 10, 1)
    with pytest.raises(RuntimeError, match="mine: OSError: my own runtime"):
        take_turns([rival], 1, lambda: None)


def test_an_export_that_fails_says_why(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-option"):
        other_tree.export(ROOT, make_checkpoint(), tmp_path / "out", "--no-such-option")
