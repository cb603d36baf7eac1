"""A commit's source beside the working tree: its packages, and its runtime as a rival."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from contextlib import suppress
from pathlib import Path

from rivals.turns import Sample

ROOT = Path(__file__).resolve().parent.parent.parent


def commit_of(name: str) -> str:
    """Return a commit's hash, shortened. Raises RuntimeError if git does not know it."""
    return _git("rev-parse", "--short=7", "--verify", f"{name}^{{commit}}").decode().strip()


def changed() -> bool:
    """Whether the working tree differs from its commit."""
    return bool(_git("status", "--porcelain", "--untracked-files=no").strip())


def extract(commit: str, directory: Path) -> Path:
    """Write a commit's files to a new directory unless it exists; return it. Raises RuntimeError."""
    if not directory.is_dir():
        part = directory.with_name(f"{directory.name}.part")
        with tarfile.open(fileobj=io.BytesIO(_git("archive", commit))) as archive:
            archive.extractall(part, filter="data")
        part.rename(directory)
    return directory


def _git(*arguments: str) -> bytes:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True).stdout
    except FileNotFoundError as error:
        raise RuntimeError("git is not installed, which knows the other commit") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"git: {' '.join(error.stderr.decode().split())}") from error


def environment(tree: Path) -> dict[str, str]:
    """Return the environment in which Python imports a tree's packages."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(tree / part) for part in ("", "models", "runtime"))}


def export(tree: Path, checkpoint: Path, output: Path, *options: str) -> Path:
    """Run a tree's melt-export, unverified. Raises RuntimeError with its last line."""
    scripts = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, function = scripts["melt-export"].split(":")
    command = [sys.executable, "-P", "-c", f"from {module} import {function}; {function}()", "--no-verify"]
    command += ["--checkpoint", str(checkpoint), "--output", str(output), "--max-batch", "1", *options]
    ran = subprocess.run(command, env=environment(tree), capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or ["melt-export failed"])[-1])
    return output


class TreeRival:
    """A tree's runtime on a package, in a fresh process. Takes turns as ``Rival`` does.

    Raises RuntimeError, with the reason, when it fails.
    """

    def __init__(self, name: str, tree: Path, package: Path, threads: int, loops: int, context: int, tokens: int):
        self.name, self.samples = name, list[Sample]()
        order = {"package": str(package), "threads": threads, "loops": loops, "context": context, "tokens": tokens}
        program = str(Path(__file__).with_name("any_commit.py"))
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  (closed by close)
        child = subprocess.Popen(
            [sys.executable, "-P", program, json.dumps(order)],
            env=environment(tree),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        self._child, self._orders, self._samples = child, child.stdin, child.stdout

    def visit(self, *, counts: bool) -> None:
        """Take one turn. A sample that does not count is a warm-up."""
        try:
            print(file=self._orders, flush=True)
            line = self._samples.readline()
        except OSError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.name}: {self._last_words()}")
        if counts:
            self.samples.append(json.loads(line))

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self._orders.close()
        self._child.wait()
        self._samples.close()
        self._errors.close()

    def _last_words(self) -> str:
        self._child.wait()
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or ["its process ended"])[-1]
