"""``melt-export`` and ``melt-verify``, as a person or a script runs them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, MakeCheckpoint, MakePackage
from melt_models import LoopLMConfig, LoopLMForCausalLM
from melt_runtime.package.files import file_hash
from melt_runtime.package.reader import Package
from processes import LIMIT, started
from safetensors.torch import load_file, save_file

# Runs each command in a process of its own that has imported everything already, which takes longer than most commands.
SERVER = """
import json, os, resource, signal, sys, traceback
from melt_export import cli, export
from melt_export.parity import quality, verify

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(300)
        for number, path in ((1, job["stdout"]), (2, job["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.environ.update(job["environment"])
        if job["file_limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
        sys.argv = [job["command"], *job["arguments"]]
        code = 0
        try:
            {"melt-export": cli.export_main, "melt-verify": cli.verify_main}[job["command"]]()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking down all that was imported takes seconds
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    def refusal(self) -> str:
        """The one line of a refusal, without the command's name."""
        assert self.code == 2, self.stderr
        assert self.stdout == ""
        lines = self.stderr.splitlines()
        assert len(lines) == 1, lines
        command, _, message = lines[0].partition(": ")
        assert command in ("melt-export", "melt-verify")
        return message


class Commands:
    """The two commands, ready to run."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.count = directory, 0
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, command: str, *arguments: object, file_limit: int = 0, **environment: str) -> Result:
        self.count += 1
        files = [self.directory / f"{self.count}.{name}" for name in ("stdout", "stderr")]
        job = {
            "command": command,
            "arguments": [str(argument) for argument in arguments],
            "stdout": str(files[0]),
            "stderr": str(files[1]),
            "environment": {"COLUMNS": "200", **environment},
            "file_limit": file_limit,
        }
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(job), file=self.server.stdin, flush=True)
        code = int(self.server.stdout.readline())
        return Result(code, *(file.read_text() for file in files))

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    """One layer, a tokenizer: the quickest to export."""
    return make_checkpoint(num_hidden_layers=1, tokenizer=True)


@pytest.fixture
def package(make_package: MakePackage, checkpoint: Path, tmp_path: Path) -> Path:
    """A package that a test may spoil."""
    return Path(shutil.copytree(make_package(checkpoint), tmp_path / "package"))


def installed(command: str) -> str:
    """The command as the installation put it beside Python."""
    return str(Path(sys.executable).with_name(command))


def export(checkpoint: Path, output: Path) -> list[object]:
    return ["melt-export", "--checkpoint", checkpoint, "--output", output]


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# What an export says


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> tuple[Path, Any]:
    """A package made by the installed command, and what that printed."""
    output = tmp_path_factory.mktemp("exported") / "package"
    command = [installed("melt-export"), *map(str, export(checkpoint, output)[1:]), "--verify-tokens", "16"]
    return output, subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_an_export_prints_what_it_made_and_how_close_it_is(exported: tuple[Path, Any]) -> None:
    output, result = exported
    assert result.returncode == 0, result.stderr
    assert all(
        part in result.stdout for part in (str(output), "onnxruntime, fp32", "worst relative error", "in flight")
    )
    assert re.search(r"greedy tokens (\d+)/\1 the same", result.stdout)
    assert "melt-export:" not in result.stderr


def test_an_export_keeps_the_comparison_in_the_package(exported: tuple[Path, Any]) -> None:
    output, _ = exported
    report = json.loads((output / "parity.json").read_text())
    assert report["passed"] is True
    assert report["manifest_sha256"] == file_hash(output / "manifest.json")


def test_an_export_leaves_nothing_beside_the_package(exported: tuple[Path, Any]) -> None:
    output, _ = exported
    assert [path.name for path in output.parent.iterdir()] == ["package"]


def test_two_processes_export_the_same_bytes(
    exported: tuple[Path, Any], checkpoint: Path, make_package: MakePackage
) -> None:
    assert Package.open(exported[0]).manifest == Package.open(make_package(checkpoint)).manifest


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, run: Commands) -> tuple[Path, Result]:
    """An Ouro that the installed melt-convert made a MELT, exported without verification; and what that printed."""
    directory = tmp_path_factory.mktemp("converted")
    fields: dict[str, Any] = {name: value for name, value in TINY.items() if name != "chunk_size"}
    torch.manual_seed(0)
    LoopLMForCausalLM(LoopLMConfig(**{**fields, "num_hidden_layers": 1})).save_pretrained(directory / "ouro")
    convert = [installed("melt-convert"), str(directory / "ouro"), str(directory / "melt"), "--chunk-size", "8"]
    subprocess.run(convert, check=True, capture_output=True, timeout=300)
    return directory / "package", run(*export(directory / "melt", directory / "package"), "--no-verify")


def test_a_converted_ouro_says_which_part_nobody_trained(converted: tuple[Path, Result]) -> None:
    package, result = converted
    assert result.code == 0, result.stderr
    assert "latent_gate: initialised by a conversion, never trained" in result.stdout
    assert "token ids only: the checkpoint has no tokenizer.json" in result.stdout
    assert Package.open(package).manifest.untrained == ("latent_gate",)


def test_an_export_of_a_checkpoint_without_a_tokenizer_says_so(converted: tuple[Path, Result]) -> None:
    assert "has no tokenizer.json, so that prompts and answers will be token ids" in converted[1].stderr


def test_an_export_without_verification_says_so(converted: tuple[Path, Result]) -> None:
    package, result = converted
    assert re.search(r"parity +not verified", result.stdout)
    assert not (package / "parity.json").exists()


def test_an_export_can_be_verified_later(run: Commands, converted: tuple[Path, Result]) -> None:
    package, _ = converted
    result = run("melt-verify", package, "--checkpoint", package.parent / "melt", "--tokens", 8)
    assert result.code == 0, result.stderr


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "melt-export",
            "--checkpoint --output --precision --max-seq-len --max-batch --chunk --dialect --no-verify "
            "--verify-tokens --force --version",
        ),
        ("melt-verify", "--checkpoint --tokens --version package"),
    ],
)
def test_help_names_every_option(run: Commands, command: str, options: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert all(option in result.stdout for option in options.split())
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["melt-export", "melt-verify"])
def test_version(run: Commands, command: str) -> None:
    assert run(command, "--version").stdout.startswith("melt-export 0.")


# Refusals of melt-export


def test_the_installed_command_refuses_in_one_line(tmp_path: Path) -> None:
    command = [installed("melt-export"), "--checkpoint", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"melt-export: checkpoint directory {tmp_path / 'nowhere'} does not exist\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-seq-len", 257], "--max-seq-len 257 is more than the checkpoint's 256 positions"),
        (["--max-seq-len", 0], "max-seq-len"),
        (["--precision", "fp8"], "fp8"),
        (["--dialect", "klingon"], "klingon"),
        (["--no-such-option"], "--no-such-option"),
    ],
    ids=["positions", "range", "precision", "dialect", "unknown"],
)
def test_an_option_that_makes_no_sense_is_refused(
    run: Commands, checkpoint: Path, tmp_path: Path, options: list[object], words: str
) -> None:
    assert words in run(*export(checkpoint, tmp_path / "package"), *options).refusal()
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_is_missing_is_named(run: Commands, checkpoint: Path) -> None:
    assert "--output" in run("melt-export", "--checkpoint", checkpoint).refusal()


def test_checkpoint_and_output_need_no_option_names(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    made = run("melt-export", checkpoint, tmp_path / "both", "--no-verify")
    assert made.code == 0, made.stderr
    assert run("melt-export", "--checkpoint", checkpoint, tmp_path / "one", "--no-verify").code == 0
    assert content(tmp_path / "one")["weights.data"] == content(tmp_path / "both")["weights.data"]
    assert run("melt-verify", tmp_path / "both", checkpoint, "--tokens", "4").code == 0
    assert "--output is missing" in run("melt-export", checkpoint).refusal()
    assert "--checkpoint is missing" in run("melt-verify", tmp_path / "both").refusal()
    assert "'c' is one argument too many" in run("melt-export", "a", "b", "c").refusal()
    assert "'b' is one argument too many" in run(*export(checkpoint, tmp_path / "new"), "b").refusal()


def test_a_file_as_checkpoint_is_refused(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    message = run(*export(checkpoint / "config.json", tmp_path / "package")).refusal()
    assert "is a file; give the directory that holds config.json" in message


def test_a_directory_with_content_is_refused_without_force(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "--force" in run(*export(checkpoint, tmp_path)).refusal()
    assert content(tmp_path) == {"thesis.txt": b"mine"}


def test_a_target_that_cannot_be_created_is_refused(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "file" in run(*export(checkpoint, tmp_path / "file" / "package")).refusal()


def test_a_refusal_shows_its_traceback_on_demand(run: Commands, tmp_path: Path) -> None:
    result = run(*export(tmp_path / "nowhere", tmp_path / "package"), MELT_TRACEBACK="1")
    assert result.code != 0
    assert "Traceback (most recent call last)" in result.stderr
    assert "CheckpointError" in result.stderr


def last_line(result: Result) -> str:
    """The refusal of an export that had shown progress before."""
    assert result.code == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert sum(line.startswith("melt-export: ") for line in lines) == 1
    return lines[-1]


def test_a_broken_weight_is_refused_while_writing(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(checkpoint, tmp_path / "spoiled"))
    state = load_file(spoiled / "model.safetensors")
    state["lm_head.weight"][0, 0] = float("nan")
    save_file(state, spoiled / "model.safetensors", metadata={"format": "pt"})
    line = last_line(run(*export(spoiled, tmp_path / "package")))
    assert line == "melt-export: model.safetensors: tensor lm_head.weight holds NaN or Inf"
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled"]


def test_a_full_disk_leaves_the_old_package(run: Commands, checkpoint: Path, package: Path, tmp_path: Path) -> None:
    before = content(package)
    result = run(*export(checkpoint, package), "--force", file_limit=65536)
    assert last_line(result) == f"melt-export: {package}: File too large"
    assert content(package) == before
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_a_terminated_export_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    command = [installed("melt-export"), *map(str, export(checkpoint, tmp_path / "package")[1:])]
    with started(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(".package.partial-*/tokenizer.json")):  # it has begun
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 143
    assert list(tmp_path.iterdir()) == []


# melt-verify


def test_a_package_that_matches_passes(run: Commands, checkpoint: Path, package: Path) -> None:
    result = run("melt-verify", package, "--checkpoint", checkpoint, "--tokens", 4)
    assert result.code == 0, result.stderr
    assert "passed: worst relative error" in result.stdout
    assert all(f"loop {loop}" in result.stdout for loop in (1, 2, 3, 4))
    assert json.loads((package / "parity.json").read_text())["passed"] is True


def test_a_package_with_other_weights_fails_and_says_where(run: Commands, checkpoint: Path, package: Path) -> None:
    weights = package / "weights.data"
    with weights.open("r+b") as handle:
        handle.seek(16384)
        handle.write(np.ones(64, np.float32).tobytes())
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["files"]["weights.data"]["sha256"] = file_hash(weights)
    (package / "manifest.json").write_text(json.dumps(manifest))

    result = run("melt-verify", package, "--checkpoint", checkpoint, "--tokens", 4)
    assert result.code == 1
    assert "FAILED" in result.stdout
    differences = [line for line in result.stderr.splitlines() if line.startswith("melt-verify: ")]
    assert any("hidden of loop 1 differs by" in line for line in differences)
    assert json.loads((package / "parity.json").read_text())["passed"] is False


def test_a_changed_byte_is_refused(run: Commands, checkpoint: Path, package: Path) -> None:
    weights = package / "weights.data"
    changed = bytearray(weights.read_bytes())
    changed[1000] ^= 1
    weights.write_bytes(changed)
    message = run("melt-verify", package, "--checkpoint", checkpoint).refusal()
    assert "weights.data was changed" in message


def test_another_checkpoint_is_refused(run: Commands, tiny_checkpoint: Path, package: Path) -> None:
    message = run("melt-verify", package, "--checkpoint", tiny_checkpoint).refusal()
    assert "the package was not made from" in message
    assert "num_hidden_layers" in message


def test_a_package_that_is_not_there_is_refused(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    assert "does not exist" in run("melt-verify", tmp_path / "nowhere", "--checkpoint", checkpoint).refusal()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache", "int8", "--dialect", "standard"], "--cache int8 needs the dialect onnxruntime at precision fp32"),
        (["--method", "rtn"], "need quantized weights: add --weights"),
        (["--calibration", __file__], "needs quantization: add --weights or --cache"),
    ],
)
def test_options_of_quantization_that_say_nothing_are_refused(
    run: Commands, checkpoint: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = run(*export(checkpoint, tmp_path / "package"), *options)
    assert result.code == 2
    assert message in result.stderr
    assert not (tmp_path / "package").exists()


def test_an_export_with_a_quantized_cache_says_so(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    result = run(*export(checkpoint, tmp_path / "package"), "--cache", "int8", "--verify-tokens", 4)
    assert result.code == 0, result.stderr
    assert "int8, one scale per channel" in result.stdout
    assert "against fp32" in result.stdout
    assert run("melt-verify", tmp_path / "package", "--checkpoint", checkpoint, "--max-kl", 0, "--tokens", 2).code == 1
