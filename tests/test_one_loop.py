"""A package of one loop carries nothing to a second one: no latent, no gate, no branch; it computes what it did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import ArgumentError, LoopSettings, PackageError, Runtime, Scheduler
from melt_runtime.cli.inspect import describe
from melt_runtime.package.manifest_schema import read_manifest
from melt_runtime.package.reader import Package
from melt_runtime.server.service import Service

from melt_export.parity.verify import verify
from melt_export.quantization.options import WeightOptions

DIALECTS = ("onnxruntime", "standard", "portable")
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]


@pytest.fixture(params=["melt", "looplm"])
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_looplm: MakeCheckpoint) -> Path:
    return {"melt": make_checkpoint, "looplm": make_looplm}[request.param](total_ut_steps=1)


@pytest.fixture
def package(checkpoint: Path, make_package: MakePackage) -> Path:
    return make_package(checkpoint, chunk=8)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_it_agrees_with_pytorch(checkpoint: Path, make_package: MakePackage, dialect: str) -> None:
    report = verify(make_package(checkpoint, chunk=8, dialect=dialect), checkpoint, tokens=12)
    assert report.failures() == []
    assert {(state.loop, state.quantity) for state in report.states} == {
        (1, name) for name in ("hidden", "exit probability", "logits", "key rows", "value rows", "embedding")
    }
    assert all(run.same == run.tokens for run in report.generations)


@pytest.mark.parametrize("latent_init", ["first_input", "zeros"])
@pytest.mark.parametrize("aggregation", ["gate", "scalar_gate", "ema", "mean", "last"])
def test_however_a_latent_would_start(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, aggregation: str, latent_init: str
) -> None:
    checkpoint = make_checkpoint(
        total_ut_steps=1, aggregation=aggregation, latent_init=latent_init, num_hidden_layers=1
    )
    assert verify(make_package(checkpoint), checkpoint, tokens=8).failures() == []


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_it_agrees_too(make_checkpoint: MakeCheckpoint, make_package: MakePackage, kind: str) -> None:
    checkpoint = make_checkpoint(total_ut_steps=1)
    package = make_package(checkpoint, weights=WeightOptions(kind, method="rtn"))
    report = verify(package, checkpoint, tokens=8)
    assert [failure for failure in report.failures() if "KL" not in failure] == []


def test_it_holds_no_gate_no_branch_and_no_latent(package: Path) -> None:
    graph = onnx.load(package / "loop_step.onnx", load_external_data=False).graph
    assert "If" not in {node.op_type for node in graph.node}
    assert [tensor.name for tensor in graph.initializer if "latent_gate" in tensor.name] == []
    manifest = Package.open(package).manifest
    assert [state.input for state in manifest.states][:2] == ["hidden", "key_cache.0"]
    assert {spec.name for spec in manifest.graphs["loop_step"].inputs} & {"latent", "first_loop", "active"} == set()


def test_it_computes_the_first_loop_of_the_same_model_with_more(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    one, four = (Runtime.load(make_package(make_checkpoint(total_ut_steps=loops))) for loops in (1, 4))
    logits = [runtime.driver().append([PROMPT], LoopSettings(1)) for runtime in (one, four)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_batch_answers_as_each_alone(checkpoint: Path, make_package: MakePackage, dialect: str) -> None:
    runtime = Runtime.load(make_package(checkpoint, chunk=8, dialect=dialect))
    prompts = [PROMPT, PROMPT[:4], [7]]
    together = runtime.generate(prompts, max_tokens=8, ignore_eos=True)
    alone = [runtime.generate(prompt, max_tokens=8, ignore_eos=True) for prompt in prompts]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_a_session_goes_back_and_on(package: Path) -> None:
    session = Runtime.load(package).session()
    session.append(PROMPT)
    expected = session.logits()
    session.generate(max_tokens=3)
    session.truncate(len(PROMPT))
    assert np.array_equal(session.logits(), expected)


def test_a_second_loop_is_refused_and_any_threshold_allowed(package: Path) -> None:
    runtime = Runtime.load(package)
    with pytest.raises(ArgumentError, match="loops is 2; this package runs one: its checkpoint has total_ut_steps 1"):
        runtime.generate(PROMPT, loops=2)
    driver = runtime.driver()
    with pytest.raises(ArgumentError, match="runs one"):
        driver.append([PROMPT], LoopSettings(2))
    assert driver.lengths.tolist() == [0]
    answers = {
        runtime.generate(PROMPT, max_tokens=4, ignore_eos=True, exit_threshold=threshold).token_ids
        for threshold in (0.0, 0.5, 1.0)
    }
    assert len(answers) == 1


def test_only_a_package_that_an_older_runtime_could_not_run_has_the_newer_format(
    package: Path, tiny_package: Path, make_looplm: MakeCheckpoint, make_package: MakePackage
) -> None:
    looplm = make_package(make_looplm(), chunk=8)
    found = [Package.open(path).manifest.format_version for path in (package, tiny_package, looplm)]
    assert found == [2, 3, 1]


def test_a_manifest_of_several_loops_without_a_latent_is_refused(package: Path) -> None:
    content = json.loads(Package.open(package).manifest.to_json())
    with pytest.raises(PackageError, match="loops is 4; without the state latent there is one"):
        read_manifest(json.dumps(content | {"loops": 4}))


def test_nobody_promises_more_loops(package: Path) -> None:
    assert describe(Package.open(package)).memory.most_loops == 1
    runtime = Runtime.load(package)
    with Scheduler(runtime, 1) as scheduler:
        assert [Service(runtime, scheduler, "one", max_loops=loops).max_loops for loops in (None, 3)] == [1, 1]
