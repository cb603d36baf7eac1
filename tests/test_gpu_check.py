"""gpu_check's own logic, tried with ONNX Runtime on the CPU in the device's place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from melt_export.gpu_check import checks, timing
from melt_export.gpu_check.__main__ import app
from melt_export.gpu_check.machine import HostMachine, described
from melt_export.gpu_check.report import FAILED, MEASURED, NOT_RUN, PASSED, Report, Result
from melt_export.gpu_check.subjects import Subject
from melt_export.gpu_check.targets import NotHere, Target, ready, targets
from melt_runtime import Runtime
from melt_runtime.backends.devices import devices
from processes import LIMIT
from rich.console import Console
from typer.testing import CliRunner

from melt_export.parity.expected import expected_of


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Any]:
    """The JSON file of a whole run over the usual small checkpoint."""
    file = tmp_path_factory.mktemp("check") / "report.json"
    arguments = ["--quick", "--backend", "onnxruntime", "--json", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--checkpoint", str(tiny_checkpoint), "--precision", "fp32"])
    assert result.exit_code == 0, result.output
    assert "passed:" in result.output
    return dict(json.loads(file.read_text(encoding="utf-8")))


def rows(report: dict[str, Any], check: str) -> list[dict[str, Any]]:
    """The rows of a check."""
    return [row for row in report["results"] if row["check"] == check]


class TestAWholeRun:
    def test_every_dialect_agrees_with_pytorch(self, report: dict[str, Any]) -> None:
        found = rows(report, "states and logits") + rows(report, "greedy tokens")
        assert {row["target"] for row in found} == {"onnxruntime, onnxruntime", "onnxruntime, standard"}
        assert {row["state"] for row in found} == {PASSED}
        assert all(row["figures"]["loops"] == 4 for row in rows(report, "states and logits"))

    def test_memory_is_watched_at_1_4_and_16_loops(self, report: dict[str, Any]) -> None:
        for row in rows(report, "memory"):
            assert list(row["figures"]["used_bytes"]) == ["1", "4", "16"]
            assert row["state"] == PASSED

    def test_what_does_not_apply_is_listed_with_its_reason(self, report: dict[str, Any]) -> None:
        found = rows(report, "graphs against plain runs")
        assert [row["state"] for row in found] == [NOT_RUN, NOT_RUN]
        assert "captures no CUDA graphs" in found[0]["detail"]

    def test_times_stand_beside_the_bytes_moved_at_the_measured_bandwidth(self, report: dict[str, Any]) -> None:
        found = rows(report, "decode")
        assert {row["target"] for row in found} >= {"PyTorch, eager, cpu", "onnxruntime, standard"}
        for row in found:
            figures = row["figures"]
            least = figures["moved_bytes"] / report["bandwidth"]["bytes_per_second"]
            assert figures["seconds_at_bandwidth"] == pytest.approx(least)
            assert "wall time" in figures["clock"]

    def test_it_names_machine_date_and_versions(self, report: dict[str, Any]) -> None:
        assert report["machine"]["host"]
        assert {"melt-export", "torch", "onnxruntime"} <= set(report["versions"])
        assert report["date"].endswith("UTC")


@pytest.mark.skipif(bool(devices()), reason="there is an NVIDIA device here")
def test_without_a_device_it_says_so_in_one_sentence_and_exits_with_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "melt_export.gpu_check"], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 2
    assert done.stderr == "gpu_check: there is no NVIDIA driver with a device here, so there is no GPU to check\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--backend", "abacus"],
        ["--model", "abacus"],
        ["--precision", "fp1"],
        ["--checkpoint", "no-such-directory"],
        ["--backend", "onnxruntime", "--json", "no/such/directory.json"],
    ],
)
def test_a_mistake_is_refused_before_anything_is_made(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1  # of the test runner; the command turns it into 2
    assert arguments[-1].split("/")[0] in str(result.exception)


def test_every_backend_has_its_targets_and_tensorrt_one_for_each_flavour() -> None:
    found = [target.name for target in targets(("onnxruntime-cuda", "tensorrt"), portable=True)]
    assert "onnxruntime-cuda, portable" in found
    assert {"tensorrt (tensorrt), standard", "tensorrt (tensorrt-rtx), portable"} <= set(found)


@pytest.mark.skipif(bool(devices()), reason="there is an NVIDIA device here")
def test_a_target_that_cannot_run_here_says_why(tiny_package: Path) -> None:
    from melt_runtime.package.reader import Package

    with pytest.raises(NotHere, match="no NVIDIA driver"):
        ready(Target("onnxruntime-cuda", "onnxruntime"), Package.open(tiny_package), 0, lambda *_: None)


def test_a_package_of_another_checkpoint_does_not_pass(
    tiny_checkpoint: Path, tiny_package: Path, make_checkpoint: Any
) -> None:
    runtime = Runtime.load(tiny_package, backend="onnxruntime")
    other = make_checkpoint(initializer_range=0.11)
    expected = expected_of(other, runtime.manifest, 4)
    subject = Subject("another", other, {}, runtime.manifest, expected)
    states, _ = checks.parity(runtime, subject, checks.row_of(subject, "onnxruntime"))
    assert states.state == FAILED
    assert "differs" in states.detail


class Growing(HostMachine):
    """A machine whose memory grows by so much every time one looks."""

    def __init__(self, step: int):
        self.step, self.used = step, 0

    def memory_used(self) -> int:
        self.used += self.step
        return self.used


@pytest.mark.parametrize(("step", "state"), [(0, PASSED), (1 << 20, PASSED), (64 << 20, FAILED)])
def test_memory_that_grows_with_the_loops_does_not_pass(tiny_package: Path, step: int, state: str) -> None:
    runtime = Runtime.load(tiny_package, backend="onnxruntime")
    result = checks.flat_memory(runtime, Growing(step), 2, lambda *row: Result("model", "target", *row))
    assert result.state == state
    assert result.figures["grown_bytes"] == 2 * step


def test_two_ways_of_running_that_differ_in_a_bit_do_not_pass(tiny_package: Path) -> None:
    first, second = (Runtime.load(tiny_package, backend="onnxruntime") for _ in range(2))
    row = lambda *parts: Result("model", "target", *parts)  # noqa: E731
    assert checks.same_answers(first, second, 3, row).state == PASSED
    open_driver = second.driver

    def altered(batch: int = 1) -> Any:
        driver = open_driver(batch)
        append = driver.append
        driver.append = lambda tokens, settings: np.nextafter(append(tokens, settings), np.float32(9e9))  # type: ignore[method-assign]
        return driver

    second.driver = altered  # type: ignore[method-assign]
    assert checks.same_answers(first, second, 3, row).state == FAILED


def test_moved_bytes_count_weights_and_rows_once_a_loop_and_the_head_once(tiny_package: Path) -> None:
    manifest = Runtime.load(tiny_package, backend="onnxruntime").manifest
    cache = manifest.cache_bytes(10)
    assert timing.moved_bytes(manifest, 1000, 70, loops=3, tokens=10) == 3 * (1000 + cache) + 70


def test_bandwidth_counts_every_byte_read_and_written() -> None:
    assert described(1000, [0.5, 1.0, 4.0], "copies")["bytes_per_second"] == 2000


@pytest.mark.parametrize(
    ("states", "passed", "says"),
    [
        ([PASSED, NOT_RUN, MEASURED], True, "passed: 1 passed, 0 failed, 1 not run"),
        ([PASSED, FAILED], False, "FAILED: 1 passed, 1 failed"),
        ([NOT_RUN, MEASURED], False, "nothing could be checked"),
    ],
)
def test_a_run_passes_if_something_was_checked_and_nothing_failed(states: list[str], passed: bool, says: str) -> None:
    results = [Result("model", "target", "check", state, "because") for state in states]
    report = Report("", "", {"card": "none"}, {}, {"bytes_per_second": 1e9, "how": ""}, True, results)
    console = Console(record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    report.show(console)
    assert report.passed is passed
    assert says in console.export_text()
