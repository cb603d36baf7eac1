"""An export compares staggered decoding with PyTorch in every run, and says what it costs."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import LoopSettings, Runtime
from melt_runtime.cli.inspect import describe
from melt_runtime.cli.main import app as run_app
from melt_runtime.package.files import file_hash
from melt_runtime.package.reader import Package
from melt_runtime.package.staggered_cost import StaggeredCost
from onnx import helper, numpy_helper
from test_staggered_package import edited, per_sequence
from typer.testing import CliRunner

from melt_export.checkpoint import Checkpoint
from melt_export.cli import export_app, verify_app
from melt_export.export import building
from melt_export.options import ExportOptions
from melt_export.parity.distances import agreement, log_softmax
from melt_export.parity.quality import held_out
from melt_export.parity.staggered import lanes_of, package_runs
from melt_export.parity.verify import verify
from melt_export.reference.float32_matmul import FLOAT64
from melt_export.reference.pytorch import reference_of
from melt_export.reference.staggered import schedule, staggered_runs

PROMPT, TOKENS = [5, 9, 4, 7, 8, 30, 31], [8, 30, 2, 2, 17, 9]


def test_one_token_enters_per_run_and_leaves_after_its_last_loop() -> None:
    assert list(schedule(3, 2, 2)) == [(0, (0,)), (0, (1, 0)), (1, (1, 0)), (2, (1,))]
    assert list(schedule(2, 3, 1)) == [(at, (loop,)) for at in range(2) for loop in range(3)]
    runs = list(schedule(9, 4, 4))
    assert len(runs) == 9 + 3
    assert max(len(flight) for _, flight in runs) == 4
    assert max(len(flight) for _, flight in schedule(9, 8, 3)) == 3


@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize("dialect", ["onnxruntime", "standard", "portable"])
def test_every_run_of_a_package_is_pytorchs(
    dialect: str, lanes: int, make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    checkpoint = make_checkpoint(tokenizer=True)
    runtime = Runtime.load(make_package(checkpoint, dialect=dialect))
    reference = reference_of(Checkpoint.of(checkpoint).load())
    want = staggered_runs(reference, PROMPT, TOKENS, 4, 8, lanes, FLOAT64)
    driver = runtime.driver()
    driver.append([PROMPT], LoopSettings(4))
    got = list(package_runs(driver, TOKENS, 4, lanes))
    assert [run.loops for run in got] == [run.loops for run in want]
    assert (4, 3, 2, 1)[:lanes] in [run.loops for run in want]
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine.hidden, theirs.hidden, rtol=0, atol=2e-5)
        np.testing.assert_allclose(mine.logits, theirs.logits, rtol=0, atol=2e-5)


def by_sequence(package: Path, directory: Path) -> Path:
    """Copy a package whose tokens count as in their first loop only if all tokens of the sequence are."""
    shutil.copytree(package, directory)
    file = directory / "loop_step.onnx"
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["all_first" if name == "first_loop" else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    for node in (
        helper.make_node("Cast", ["all_first/least"], ["all_first"], to=onnx.TensorProto.BOOL),
        helper.make_node("ReduceMin", ["all_first/number", "axis"], ["all_first/least"]),
        helper.make_node("Cast", ["first_loop"], ["all_first/number"], to=onnx.TensorProto.INT32),
    ):
        model.graph.node.insert(0, node)
    onnx.save(model, file)

    def edit(content: dict) -> None:
        content["files"][file.name] = {"sha256": file_hash(file), "bytes": file.stat().st_size}

    edited(directory, edit)
    return directory


def test_a_package_that_is_wrong_only_where_tokens_are_in_different_loops_is_found(
    tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path
) -> None:
    found = verify(by_sequence(tiny_package, tmp_path / "wrong"), tiny_checkpoint, tokens=4).failures()
    assert found
    assert all(failure.startswith("staggered ") for failure in found)


def test_a_package_from_before_is_verified_without_it(
    tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path
) -> None:
    report = verify(per_sequence(tiny_package, tmp_path / "old"), tiny_checkpoint, tokens=4)
    assert report.failures() == []
    assert report.staggered is None
    assert not any("staggered" in state.quantity for state in report.states)


def test_what_it_costs_is_what_pytorch_says(tiny_checkpoint: Path, package_copy: Path) -> None:
    report = verify(package_copy, tiny_checkpoint, tokens=4)
    assert {state.loop for state in report.states if state.quantity == "staggered logits"} == {1, 2, 3, 4}
    held = held_out(package_copy, Package.open(package_copy).manifest, None, 256)
    reference, kl, top1 = reference_of(Checkpoint.of(tiny_checkpoint).load()), list[float](), list[bool]()
    for ids in held.sequences:
        finals = [run.logits[0] for run in staggered_runs(reference, [], ids, 4, 1, 4) if run.loops[0] == 4]
        pairs = agreement(log_softmax(np.stack(finals)), log_softmax(reference.logits(ids, 4, 1)))
        kl, top1 = kl + pairs[0], top1 + pairs[1]
    cost = report.staggered
    assert cost is not None
    assert (cost.lanes, cost.chunk, cost.positions, cost.text) == (4, 8, 256, "random tokens")
    assert cost.kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert cost.top1 == pytest.approx(np.mean(top1), abs=0.01)
    assert 0 < cost.kl < cost.chunk_kl
    assert StaggeredCost(**json.loads((package_copy / "parity.json").read_text())["staggered"]) == cost


@pytest.mark.parametrize(
    ("fields", "options", "lanes"),
    [
        ({}, {}, 4),
        ({}, {"chunk": 3}, 3),
        ({}, {"chunk": 1}, 1),
        ({"total_ut_steps": 12, "num_hidden_layers": 1}, {"max_seq_len": 16, "max_batch": 1}, 8),
    ],
)
def test_as_many_tokens_are_in_flight_as_the_chunk_holds(
    fields: dict[str, int], options: dict[str, int], lanes: int, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint, package = make_checkpoint(**fields), tmp_path / "package"
    with building(checkpoint, package, ExportOptions(**options)) as directory:  # type: ignore[arg-type]
        report = verify(directory, checkpoint, tokens=2)
    assert report.failures() == []
    assert lanes_of(Package.open(package).manifest, 12) == lanes
    assert (report.staggered.lanes if report.staggered else 1) == lanes


def test_a_short_cache_has_room_for_the_comparison(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    for room in (1, 2, 3, 5):
        with building(make_checkpoint(), tmp_path / str(room), ExportOptions(max_seq_len=room)) as directory:
            assert verify(directory, make_checkpoint(), tokens=1).failures() == []


def test_inspect_shows_what_it_costs_unless_the_report_is_of_another_export(package_copy: Path) -> None:
    path = package_copy / "parity.json"
    cost = StaggeredCost(4, "a text", 256, 0.0124, 0.98, 8, 0.3, 0.75)
    path.write_text(json.dumps({"passed": True, "failures": [], "staggered": asdict(cost)}))
    parity = describe(Package.open(package_copy)).parity
    assert parity is not None
    assert parity.staggered == cost
    shown = " ".join(CliRunner().invoke(run_app, ["inspect", str(package_copy)]).stdout.replace("│", "").split())
    assert "KL 1.2e-02, top-1 98.0% with 4 tokens in flight; KL 3.0e-01, top-1 75.0% in chunks of 8" in shown
    path.write_text(json.dumps({"passed": True, "manifest_sha256": "0" * 64, "staggered": asdict(cost)}))
    assert "in flight" not in CliRunner().invoke(run_app, ["inspect", str(package_copy)]).stdout


def test_staggered_answers_are_counted_beside_plain_ones(
    tiny_checkpoint: Path, package_copy: Path, make_looplm: MakeCheckpoint, make_package: MakePackage, tmp_path: Path
) -> None:
    runtime = Runtime.load(package_copy)
    asked: dict[str, Any] = {"max_tokens": 4, "exit_threshold": 1.0}
    prompts = ["one", "two and", "three", "four"]
    # Half the answers are what staggered decoding writes; those that it does not write are answered by neither.
    answers = [runtime.generate(prompt, pipeline="on", **asked).text for prompt in prompts[:2]] + ["no", "none"]
    problems = tmp_path / "problems.jsonl"
    lines = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    problems.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    expected = [0.0, 0.0]
    for line in lines:
        assert runtime.tokenizer is not None
        count = len(runtime.tokenizer.encode(line["answer"], add_special_tokens=False)) + 1
        for at, pipeline in enumerate(("off", "on")):
            written = runtime.generate(line["prompt"], max_tokens=count, exit_threshold=1.0, pipeline=pipeline)
            expected[at] += (written.text == line["answer"]) / 4
    order = [str(package_copy), "--checkpoint", str(tiny_checkpoint), "--tokens", "2", "--eval-answers", str(problems)]
    result = CliRunner().invoke(verify_app, order)
    assert result.exit_code == 0, result.output
    cost = StaggeredCost(**json.loads((package_copy / "parity.json").read_text())["staggered"])
    assert (cost.problems, cost.plain_right, cost.right) == (4, *expected)
    said = f"{cost.right:.1%} of 4 answers right, plainly {cost.plain_right:.1%}"
    assert said in " ".join(result.stdout.split())
    shown = CliRunner().invoke(run_app, ["inspect", str(package_copy)]).stdout
    assert said in " ".join(shown.replace("│", "").split())
    parity = describe(Package.open(package_copy)).parity
    assert parity is not None
    assert parity.staggered == cost
    looplm = str(make_package(make_looplm()))
    refused = CliRunner().invoke(verify_app, [looplm, "--checkpoint", str(make_looplm()), *order[3:]])
    assert "--eval-answers needs a quantized package, or one of a MELT of several loops" in str(refused.exception)


@pytest.mark.parametrize(
    "change",
    [{"right": 2}, {"problems": -1}, {"kl": "high"}, {"top1": 3}, {"lanes": 0}, {"more": 1}, {"chunk_kl": None}],
)
def test_a_cost_that_is_none_is_no_report(package_copy: Path, change: dict[str, object]) -> None:
    cost = {**asdict(StaggeredCost(4, "a text", 256, 0.0124, 0.98, 8, 0.3, 0.75)), **change}
    (package_copy / "parity.json").write_text(json.dumps({"passed": True, "staggered": cost}))
    parity = describe(Package.open(package_copy)).parity
    assert parity is not None
    assert "staggered" in parity.verdict


def test_a_text_of_ones_own_is_for_what_decodes_staggered_or_is_quantized(
    tiny_checkpoint: Path, package_copy: Path, make_looplm: MakeCheckpoint, make_package: MakePackage, tmp_path: Path
) -> None:
    text, looplm = tmp_path / "mine.txt", make_looplm()
    text.write_text("one and two and three", encoding="utf-8")
    options = ["--checkpoint", str(tiny_checkpoint), "--eval-text", str(text), "--tokens", "2"]
    result = CliRunner().invoke(verify_app, [str(package_copy), *options])
    assert "on 21 positions of mine.txt" in " ".join(result.stdout.split())
    plain = make_package(looplm, chunk=8)
    result = CliRunner().invoke(verify_app, [str(plain), "--checkpoint", str(looplm), "--eval-text", str(text)])
    assert "--eval-text needs a quantized package, or one of a MELT of several loops" in str(result.exception)
    target = ["--output", str(tmp_path / "out"), "--eval-text", str(text)]
    result = CliRunner().invoke(export_app, ["--checkpoint", str(looplm), *target])
    assert "--eval-text needs quantization, or a MELT of several loops" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loops", [2, 9])
def test_another_depth_is_compared_too(tiny_checkpoint: Path, package_copy: Path, loops: int) -> None:
    report = verify(package_copy, tiny_checkpoint, loops=loops, tokens=2)
    assert report.failures() == []
    assert report.staggered is not None
    assert report.staggered.lanes == min(loops, 4)
    assert max(state.loop for state in report.states if state.quantity == "staggered logits") == loops


def test_a_looplm_is_exact_and_has_no_cost(
    make_looplm: MakeCheckpoint, make_package: MakePackage, tmp_path: Path
) -> None:
    package = tmp_path / "package"
    shutil.copytree(make_package(make_looplm(), chunk=8), package)
    report = verify(package, make_looplm(), tokens=2)
    assert report.failures() == []
    assert report.staggered is None
    assert lanes_of(Package.open(package).manifest, 4) == 1
