"""A LoopLM (Ouro) is exported by the same road, with a cache a loop: the rival that MELT is measured against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import MakeCheckpoint, MakePackage
from melt_models.checkpoint import load_model
from melt_runtime import ArgumentError, LoopSettings, PackageError, Runtime
from melt_runtime.backends.bindings import state_buffers
from melt_runtime.cli.inspect import describe
from melt_runtime.package.manifest_schema import read_manifest
from melt_runtime.package.reader import Package
from melt_runtime.package.specs import DIALECTS

from melt_export.errors import ExportError
from melt_export.export import building
from melt_export.options import ExportOptions
from melt_export.parity.verify import verify

LOOPS = 4
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]


@pytest.fixture(scope="module")
def checkpoint(make_looplm: MakeCheckpoint) -> Path:
    return make_looplm()


@pytest.fixture(scope="module")
def package(make_package: MakePackage, checkpoint: Path) -> Path:
    return make_package(checkpoint, chunk=8)


@pytest.fixture(scope="module")
def runtime(package: Path) -> Runtime:
    return Runtime.load(package)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_loop_agrees_with_pytorch(make_package: MakePackage, checkpoint: Path, dialect: str) -> None:
    package = make_package(checkpoint, chunk=8, **({} if dialect == "onnxruntime" else {"dialect": dialect}))
    for loops in (1, LOOPS):
        report = verify(package, checkpoint, loops=loops, tokens=12)
        assert report.failures() == []
        assert {state.loop for state in report.states} == set(range(1, loops + 1))
        assert "latent" not in {state.quantity for state in report.states}
        assert all(run.same == run.tokens for run in report.generations)


def test_its_cache_bytes_are_melts_times_the_loops(package: Path, tiny_package: Path) -> None:
    looplm, melt = Package.open(package).manifest, Package.open(tiny_package).manifest
    assert looplm.cache_rows == melt.cache_rows
    assert looplm.cache_bytes(100) == LOOPS * melt.cache_bytes(100)
    allocated = [sum(s.bytes(1, m.chunk) for s in m.states if s.kind != "swap") for m in (looplm, melt)]
    assert allocated[0] == LOOPS * allocated[1]
    facts = describe(Package.open(package), length=100).memory
    assert facts.cache_bytes == facts.looplm_cache_bytes[LOOPS] == LOOPS * melt.cache_bytes(100)


def test_each_loop_writes_its_own_cache(runtime: Runtime) -> None:
    driver = runtime.driver()
    driver.append([PROMPT], LoopSettings(2))
    rows = driver.state.read("key_cache.0")[:, 0, :, : len(PROMPT)]
    assert (rows[0] != rows[1]).any()
    assert rows[:2].any(axis=(1, 3)).all()
    assert not rows[2:].any()
    assert driver.state.state_bytes == runtime.state_bytes(1)


def test_in_the_portable_dialect_every_loops_positions_are_kept_after_the_last(
    make_package: MakePackage, checkpoint: Path, runtime: Runtime
) -> None:
    portable = Runtime.load(make_package(checkpoint, chunk=8, dialect="portable"))
    assert portable.manifest.format_version > runtime.manifest.format_version  # older runtimes know no such caches
    drivers = [portable.driver(2), runtime.driver(2)]
    for driver in drivers:
        driver.append([PROMPT, PROMPT[:3]], LoopSettings(2))
        driver.append([[4], []], LoopSettings(2))
    for slot, length in ((0, len(PROMPT) + 1), (1, 3)):
        mine, theirs = (driver.state.read_positions(slot, 0, length) for driver in drivers)
        assert mine.keys() == theirs.keys()
        for name, values in mine.items():
            np.testing.assert_allclose(values, theirs[name], rtol=1e-4, atol=1e-5)
    state = drivers[0].state
    assert state.state_bytes == portable.state_bytes(2) == sum(state_buffers(portable.manifest, 2).values())


def test_the_chunk_changes_nothing(runtime: Runtime) -> None:
    answers = {runtime.generate(PROMPT, chunk=chunk, max_tokens=12, ignore_eos=True).token_ids for chunk in (1, 3, 8)}
    assert len(answers) == 1


def test_a_batch_answers_as_each_alone(runtime: Runtime) -> None:
    prompts = [PROMPT, PROMPT[:4], [7]]
    together = runtime.generate(prompts, max_tokens=8, ignore_eos=True)
    alone = [runtime.generate(prompt, max_tokens=8, ignore_eos=True) for prompt in prompts]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_products_that_read_the_same_input_are_packed(package: Path) -> None:
    nodes = onnx.load(package / "loop_step.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "MatMul" for node in nodes) == 2 * 4 + 1  # q+k+v, o, gate+up, down; the exit gate


# Refusals


def test_more_loops_than_it_has_caches_for_are_refused(runtime: Runtime, checkpoint: Path, package: Path) -> None:
    with pytest.raises(ArgumentError, match="loops is 5; this LoopLM package has caches for 4"):
        runtime.generate(PROMPT, loops=LOOPS + 1)
    driver = runtime.driver()
    with pytest.raises(ArgumentError, match="caches for 4"):
        driver.append([PROMPT], LoopSettings(LOOPS + 1))
    assert driver.lengths.tolist() == [0]
    with pytest.raises(ArgumentError, match="caches for 4"):
        verify(package, checkpoint, loops=LOOPS + 1)


def test_leaving_early_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ArgumentError, match=r"only 1\.0 is possible"):
        runtime.generate(PROMPT, exit_threshold=0.5)


def test_filled_caches_cannot_be_deepened(runtime: Runtime) -> None:
    driver = runtime.driver()
    driver.append([PROMPT], LoopSettings(2))
    with pytest.raises(ArgumentError, match="tokens in the cache ran 2"):
        driver.append([[5]], LoopSettings(3))
    driver.append([[5]], LoopSettings(1))
    assert driver.lengths.tolist() == [len(PROMPT) + 1]


def test_a_checkpoint_whose_tokens_leave_early_is_refused(make_looplm: MakeCheckpoint, tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match=r"early_exit_threshold is 0\.5"),
        building(make_looplm(early_exit_threshold=0.5), tmp_path / "out", ExportOptions()),
    ):
        pass


def test_a_checkpoint_that_reads_an_earlier_loop_runs_no_later_one(
    make_looplm: MakeCheckpoint, make_package: MakePackage
) -> None:
    checkpoint = make_looplm(early_exit_step=1, num_hidden_layers=1)
    runtime = Runtime.load(make_package(checkpoint))
    assert runtime.manifest.loops == 2
    model = load_model(checkpoint)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert (
        list(runtime.generate(PROMPT, max_tokens=8, ignore_eos=True).token_ids) == expected[0, len(PROMPT) :].tolist()
    )


def test_a_manifest_whose_caches_disagree_is_refused(package: Path) -> None:
    text = Package.open(package).manifest.to_json()
    with pytest.raises(PackageError, match=r"state key_cache\.0 is in_place .* it would be per_loop"):
        read_manifest(text.replace('"per_loop"', '"in_place"', 1))
