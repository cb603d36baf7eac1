"""The GPU benchmark's own logic, tried with ONNX Runtime on the CPU in the device's place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from melt_runtime import Runtime
from melt_runtime.backends.devices import devices
from melt_runtime.package.reader import Package
from rich.console import Console
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu
import gpu_timing
from gpu import FAILED, MEASURED, NOT_RUN, PASSED, Row, Target

app = typer.Typer()
app.command()(gpu.main)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Any]:
    """The JSON file of a whole run over the usual small checkpoint."""
    file = tmp_path_factory.mktemp("check") / "report.json"
    arguments = ["--quick", "--backend", "onnxruntime", "--json", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--checkpoint", str(tiny_checkpoint), "--precision", "fp32"])
    assert result.exit_code == 0, (result.output, result.exception)
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

    def test_times_stand_beside_the_bytes_moved_at_the_measured_bandwidth(self, report: dict[str, Any]) -> None:
        found = rows(report, "decode")
        assert {row["target"] for row in found} >= {"PyTorch, eager, cpu", "onnxruntime, standard"}
        for row in found:
            figures = row["figures"]
            least = figures["moved_bytes"] / report["bandwidth"]["bytes_per_second"]
            assert figures["seconds_at_bandwidth"] == pytest.approx(least)
            assert "wall time" in figures["clock"]
        assert {row["state"] for row in found + rows(report, "prefill")} == {MEASURED}

    def test_it_names_machine_date_and_versions(self, report: dict[str, Any]) -> None:
        assert report["machine"]["cpu"]
        assert {"melt-export", "torch", "onnxruntime"} <= set(report["versions"])
        assert report["date"].endswith("UTC")


@pytest.mark.skipif(bool(devices()), reason="there is an NVIDIA device here")
def test_without_a_device_it_says_so() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1  # of the test runner; the command turns it into one sentence and 2
    assert "NVIDIA driver" in str(result.exception)


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
    assert result.exit_code
    assert arguments[-1].split("/")[0] in str(result.exception) + result.output


def test_every_backend_has_its_targets_and_tensorrt_one_for_each_flavour() -> None:
    found = [target.name for target in gpu.targets_of(("onnxruntime-cuda", "tensorrt"), portable=True)]
    assert "onnxruntime-cuda, portable" in found
    assert {"tensorrt (tensorrt), standard", "tensorrt (tensorrt-rtx), portable"} <= set(found)


@pytest.mark.skipif(bool(devices()), reason="there is an NVIDIA device here")
def test_a_target_that_cannot_run_here_says_why(tiny_package: Path) -> None:
    target = Target("onnxruntime-cuda", "onnxruntime")
    ready, reason = gpu.built(Package.open(tiny_package), target, 0, lambda *_: None)
    assert ready is None
    assert "no NVIDIA driver" in reason


def test_a_package_of_another_checkpoint_does_not_pass(package_copy: Path, make_checkpoint: Any) -> None:
    package, target = Package.open(package_copy), Target("onnxruntime", "onnxruntime")
    states, _ = gpu.parity(package, make_checkpoint(initializer_range=0.11), target, 0, 4)
    assert states[1] == FAILED
    assert "differs" in states[2]


@pytest.mark.parametrize(("step", "state"), [(0, PASSED), (1 << 20, PASSED), (64 << 20, FAILED)])
def test_memory_that_grows_with_the_loops_does_not_pass(tiny_package: Path, step: int, state: str) -> None:
    runtime, used = Runtime.load(tiny_package, backend="onnxruntime"), iter(range(0, 100 * step + 100, step or 1))
    _, found, _, figures = gpu.flat_memory(runtime, lambda: next(used) if step else 0, 2)
    assert found == state
    assert figures["grown_bytes"] == 2 * step


def test_moved_bytes_count_weights_and_cache_once_per_loop_and_the_head_once(tiny_package: Path) -> None:
    manifest = Package.open(tiny_package).manifest
    cache = manifest.cache_bytes(10)
    assert gpu_timing.moved_bytes(manifest, (1000, 70), 10) == manifest.loops * (1000 + cache) + 70


def test_bandwidth_counts_every_byte_read_and_written() -> None:
    assert gpu_timing.copied(1000, [0.5, 1.0, 4.0], "copies")["bytes_per_second"] == 2000


@pytest.mark.parametrize(
    ("states", "passed", "says"),
    [
        ([PASSED, NOT_RUN, MEASURED], True, "passed: 1 passed, 0 failed, 1 not run"),
        ([PASSED, FAILED], False, "FAILED: 1 passed, 1 failed"),
        ([NOT_RUN, MEASURED], False, "nothing could be checked"),
    ],
)
def test_a_run_passes_if_something_was_checked_and_nothing_failed(states: list[str], passed: bool, says: str) -> None:
    found = [Row("model", "target", "check", state, "because") for state in states]
    assert gpu.verdict(found, 1.0)[0] is passed
    assert says in gpu.verdict(found, 1.0)[1]


def test_the_table_names_machine_rows_and_their_reasons() -> None:
    record = {"machine": {"card": "none"}, "versions": {}, "bandwidth": {"bytes_per_second": 1e9, "how": "copies"}}
    console = Console(record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    gpu.show(record, [Row("model", "target", "check", NOT_RUN, "because")], console)
    text = console.export_text()
    assert "card none" in text
    assert "because" in text
