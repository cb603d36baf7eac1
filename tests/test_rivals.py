"""Rivals of a benchmark run in turn, each in its own process. Mechanics only: nothing depends on time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import MakeCheckpoint, MakePackage

from melt_export.quantization.options import WeightOptions
from melt_export.quantization.stored_values import stored_values

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from rivals import matmuls, melt, pytorch, turns
from rivals.turns import Rival, Sample, best_threads, take_turns
from rivals.weights import onnx_weights


def test_a_package_and_pytorch_take_turns(tiny_package: Path, tiny_checkpoint: Path) -> None:
    visits: list[int] = []
    sides = [
        Rival("melt", melt.run, tiny_package, 1, 2, 20, 1, 10),
        Rival("eager bf16", pytorch.run, tiny_checkpoint, "bf16", 1, 2, 20, 1),
    ]
    found = take_turns(sides, 2, lambda: visits.append(1))
    assert len(visits) == 2 * 3  # two rounds, and one before that does not count
    assert [len(side.samples) for side in sides] == [2, 2]
    assert found["melt"]["time_against_first"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert found["eager bf16"]["token_s"]["median"] > 0
    assert found["melt"]["prefill_s"]["median"] > 0
    assert found["eager bf16"]["peak_bytes"]["median"] > 0


def _length_of(variable: str) -> Iterator[Sample]:
    yield {"token_s": float(len(os.environ.get(variable, "")))}


def test_a_rival_has_environment_variables_of_its_own() -> None:
    sides = [
        Rival("with", _length_of, "MELT_RIVAL", environment={"MELT_RIVAL": "four"}),
        Rival("without", _length_of, "MELT_RIVAL"),
    ]
    try:
        for side in sides:
            side.visit(counts=True)
        assert [side.samples[0]["token_s"] for side in sides] == [4.0, 0.0]
    finally:
        for side in sides:
            side.close()


def test_a_package_runs_in_small_pages_too(tiny_package: Path) -> None:
    rival = Rival("small", melt.in_small_pages, tiny_package, 1, 2, 20, 1, 10)
    found = take_turns([rival], 1, lambda: None)
    assert found["small"]["token_s"]["median"] > 0


def test_rivals_take_turns_beside_busy_processes(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    enter = turns.BusyProcesses.__enter__

    def entered(self: turns.BusyProcesses) -> turns.BusyProcesses:
        made = enter(self)
        running.append(len(self.processes))
        return made

    monkeypatch.setattr(turns.BusyProcesses, "__enter__", entered)
    rival = Rival("melt", melt.run, tiny_package, None, 2, 20, 1, 0)
    found = take_turns([rival], 1, lambda: None, busy=2)
    assert running == [2]
    assert found["melt"]["token_s"]["median"] > 0


def test_every_number_of_threads_is_tried_and_the_fastest_kept(tiny_package: Path) -> None:
    tried: list[int] = []

    def rival(threads: int) -> Rival:
        tried.append(threads)
        return Rival("melt", melt.run, tiny_package, threads, 2, 20, 1, 0)

    found = best_threads(rival, (1, 2), 2)
    assert tried == [1, 2]
    assert found["token_s"][str(found["threads"])] == min(found["token_s"].values())
    assert best_threads(rival, (3,), 2) == {"threads": 3, "token_s": {}}
    assert tried == [1, 2]  # where there is no choice, nothing is tried


def test_a_rival_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"melt: PackageError: package .* does not exist"):
        take_turns([Rival("melt", melt.run, tmp_path / "nowhere", 1, 1, 0, 1, 0)], 1, lambda: None)


def _hang() -> Iterator[dict[str, float]]:
    Event().wait()
    yield {}


def test_a_rival_that_hangs_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_LIMIT", 1)
    monkeypatch.setattr(turns, "_PATIENCE", 0.1)
    with pytest.raises(RuntimeError, match="stuck: a turn took over 1 seconds"):
        take_turns([Rival("stuck", _hang)], 1, lambda: None)


def test_stored_bits_are_told_of_layers_head_and_embedding(
    make_package: MakePackage, make_checkpoint: MakeCheckpoint
) -> None:
    package = make_package(make_checkpoint(), weights=WeightOptions("int4", method="rtn", head="int4"))
    found = onnx_weights(package)
    assert found["layers"] == found["head"] == "int4, blocks of 32, float32 scales, 8-bit activations"
    assert found["embedding"] == "float"
    assert found["bytes"] == (package / "weights.data").stat().st_size


def test_the_kernel_alone_multiplies_with_the_packages_own_weights(
    make_package: MakePackage, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the columns that fit, and as often as asked."""
    package = make_package(make_checkpoint(), weights=WeightOptions("int4", method="rtn"))
    product = next(node for node in ir.load(package / "loop_step.onnx").graph if node.op_type == "MatMulNBits")
    weight = stored_values(product)[1].float()[:16].T.numpy()
    monkeypatch.setattr(matmuls, "_CACHED_BYTES", 16 * weight.shape[0])

    model = onnx.load(package / "loop_step.onnx", load_external_data=False)
    session, inputs, stored = matmuls._matmul_in_a_loop(model, package, 1)
    (last,) = session.run(None, {**inputs, "count": np.array(3)})
    expected = inputs["x"] @ weight
    assert last.shape == (1, 16)
    np.testing.assert_allclose(last, expected, atol=0.02 * abs(expected).max())
    blocks = weight.shape[0] // 32
    assert stored == 16 * blocks * (16 + 4)

    sample = next(matmuls.cached_matmuls(package, 1))
    assert sample["bytes_s"] * sample["token_s"] == pytest.approx(matmuls._REPEATS * stored)
