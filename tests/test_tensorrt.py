"""The TensorRT backend against the ONNX Runtime backend, on a stand-in for the device (see device_double.py).

It proves bindings, swaps, captured work, lengths, ragged batches and memory; of CUDA and TensorRT it shows nothing.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, MakePackage
from device_double import HostContext, HostDevice, HostEngine, HostTensorRT, add_plans, stand_in
from melt_runtime import ArgumentError, BackendError, LoopDriver, LoopSettings, Package, PackageError, Runtime
from melt_runtime.backends.buffers import widened
from melt_runtime.backends.choose import Environment, choices
from melt_runtime.backends.control import LoopControl
from melt_runtime.backends.device_memory import layout
from melt_runtime.backends.execution import Recordings
from melt_runtime.backends.tensorrt import TensorRTBackend
from melt_runtime.bench import stopwatch
from melt_runtime.bench.stopwatch import Stopwatch
from melt_runtime.package.reader import source_hash

Load = Callable[..., Runtime]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18], [19, 20, 21, 22, 23, 24, 25, 26]]


@pytest.fixture(scope="module", params=["standard", "portable"])
def directory(
    request: pytest.FixtureRequest,
    make_checkpoint: MakeCheckpoint,
    make_package: MakePackage,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small package with an "engine". Do not change it."""
    source = make_package(make_checkpoint(), dialect=request.param)
    copy = Path(shutil.copytree(source, tmp_path_factory.mktemp("engine") / "package"))
    add_plans(copy)
    return copy


@pytest.fixture
def spoilt(directory: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(directory, tmp_path / "package"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """The stand-in, which every backend of the test opens."""
    return stand_in(monkeypatch)


def load(directory: Path, **options: Any) -> Runtime:
    """A package in the TensorRT backend."""
    package = Package.open(directory)
    return Runtime(package, TensorRTBackend(package, **options), None)


def settings(loops: int = 4, threshold: float = 1.0) -> LoopSettings:
    return LoopSettings(loops, threshold)


def states(driver: LoopDriver) -> dict[str, np.ndarray]:
    """Everything that can be read, the cache as far as it was filled."""
    found = {name: driver.state.read(name) for name in ("hidden", "latent")}
    found["exit probability"] = driver.state.exit_probability()
    for state in (state for state in driver.manifest.states if state.kind != "swap"):
        found[state.input] = driver.state.read(state.input, (..., slice(0, int(driver.lengths.max())), slice(None)))
        if state.kind == "read_only":
            found[state.output] = driver.state.read(state.output)
    return found


def real(values: np.ndarray, name: str, counts: np.ndarray) -> np.ndarray:
    """Hidden, latent and exits without the padding, whose values nothing depends on."""
    axis = {"hidden": 1, "latent": 2, "exit probability": 1}.get(name)
    if axis is None:
        return values
    moved = np.moveaxis(values, axis, -1)
    slots = np.moveaxis(moved, 1 if name == "latent" else 0, 0)
    return np.concatenate([slots[slot][..., :count].ravel() for slot, count in enumerate(counts)])


@pytest.mark.parametrize("graphs", [True, False])
def test_every_state_of_every_loop_is_onnx_runtimes(directory: Path, device: HostDevice, graphs: bool) -> None:
    ours, theirs = load(directory, graphs=graphs).driver(3), Runtime.load(directory, backend="onnxruntime").driver(3)
    steps = [PROMPTS, *([[token], [token + 1], []] for token in range(5, 10))]
    for tokens in steps:
        for chunk in ours.chunks(tokens):
            for _, _ in zip(ours.loops(chunk, settings()), theirs.loops(chunk, settings()), strict=True):
                expected = states(theirs)
                for name, values in states(ours).items():
                    if name.startswith("next_"):
                        continue  # the padding's rows, which are never committed
                    mine, other = (real(v, name, chunk.counts) for v in (values, expected[name]))
                    np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5, err_msg=name)
            columns = np.maximum(chunk.counts - 1, 0)[:, None]
            mine, other = (s.state.logits(columns)[chunk.counts > 0] for s in (ours, theirs))
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)
    assert ours.lengths.tolist() == theirs.lengths.tolist()


def graphs_of(runtime: Runtime, batch: int = 1) -> list[Any]:
    """What was captured on the state that ``generate`` used for a batch."""
    with runtime._states.lease(batch) as lease:
        assert lease.driver is not None
        return lease.driver.state.captured()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("threshold", [1.0, 0.85])
def test_graphs_plain_runs_and_onnx_runtime_give_the_same_tokens(
    directory: Path, device: HostDevice, threshold: float
) -> None:
    asked: dict[str, Any] = {"max_tokens": 110, "exit_threshold": threshold, "ignore_eos": True}
    captured, plain = (load(directory, graphs=graphs) for graphs in (True, False))
    found = [
        runtime.generate(PROMPTS, **asked)
        for runtime in (captured, plain, Runtime.load(directory, backend="onnxruntime"))
    ]
    assert found[0] == found[1] == found[2]
    kinds = {key[0] for key in graphs_of(captured, len(PROMPTS))}
    assert kinds == {"chunk" if threshold == 1.0 else "loop"}
    assert not graphs_of(plain, len(PROMPTS))
    if threshold < 1.0:
        assert len(set(found[0][0].depth)) > 1


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 0.4, "top_p": 0.8},
        {"temperature": 0.5, "min_p": 0.2},
        {"temperature": 1.0},
        {"repetition_penalty": 1.3},
    ],
)
def test_sampling_draws_what_it_draws_from_whole_rows(
    directory: Path, device: HostDevice, sampling: dict[str, float]
) -> None:
    asked: dict[str, Any] = {"max_tokens": 40, "seed": 3, "ignore_eos": True, **sampling}
    assert load(directory).generate(PROMPTS[0], **asked) == Runtime.load(directory, backend="onnxruntime").generate(
        PROMPTS[0], **asked
    )


@pytest.mark.parametrize("first", [[True, False], [False, True]])
def test_sequences_in_different_loops_may_share_a_step(directory: Path, device: HostDevice, first: list[bool]) -> None:
    found = []
    for runtime in (load(directory), Runtime.load(directory, backend="onnxruntime")):
        state = runtime.driver(2).state
        state.embed(np.array([[5], [6]]))
        ones, counts = np.ones((2, 1), np.bool_), np.ones(2, np.int64)
        state.loop(LoopControl(np.ones(2, np.bool_), ones, np.zeros(2, np.int64), counts))
        state.loop(LoopControl(np.array(first), ones, np.zeros(2, np.int64), counts))
        found.append(state.read("hidden"))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_weights_that_may_be_streamed_get_the_librarys_budget(
    spoilt: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostEngine, "streamable_weights_size", 1000)
    monkeypatch.setattr(HostEngine, "get_weight_streaming_automatic_budget", lambda _: 420, raising=False)
    for streamed in (False, True):
        add_plans(spoilt, options={"weight_streaming": True} if streamed else {})
        backend: Any = load(spoilt).backend
        assert hasattr(backend.graph_engines["loop_step"].engine, "weight_streaming_budget_v2") == streamed
    assert backend.graph_engines["loop_step"].engine.weight_streaming_budget_v2 == 420


def test_an_engine_that_picks_out_no_candidates_gives_whole_rows(spoilt: Path, device: HostDevice) -> None:
    add_plans(spoilt, candidates=0)
    runtime = load(spoilt)
    assert runtime.driver().state.candidates(np.zeros((1, 1), np.int64)) is None
    found = runtime.generate(PROMPTS[0], max_tokens=12)
    assert found == Runtime.load(spoilt, backend="onnxruntime").generate(PROMPTS[0], max_tokens=12)


def test_a_token_is_one_launch_and_brings_no_row_of_logits_back(directory: Path, device: HostDevice) -> None:
    driver = load(directory).driver()
    state: Any = driver.state
    rows = 0

    def count(columns: np.ndarray) -> np.ndarray:
        nonlocal rows
        rows += 1
        return type(state).logits(state, columns)

    driver.advance([[5]], settings())
    driver.advance([[6]], settings())
    launches, copies = state.stream.launches, state.stream.copies
    state.logits = count
    for token in range(7, 17):
        following = driver.advance([[token]], settings())
        few = following.candidates(0)
        assert few is not None
        assert few.logits.shape == (16,)
    assert state.stream.launches - launches == 10
    assert state.stream.copies - copies == 0  # all of them are inside the graph
    assert rows == 0


def test_each_attention_length_has_one_graph(directory: Path, device: HostDevice) -> None:
    driver = load(directory).driver()
    for token in range(140):
        driver.append([[token % 40]], settings(2))
    state: Any = driver.state
    assert sorted(key[2] for key in state.captured()) == [64, 96, 128, 192]


def test_the_oldest_graph_makes_way(directory: Path) -> None:
    stream = HostDevice().stream()
    contexts = lambda: SimpleNamespace(capturable=lambda: True)  # noqa: E731
    recordings, done = Recordings(stream, contexts, most=2), []  # type: ignore[arg-type, var-annotated]
    for key in ("a", "a", "b", "b", "a", "c", "c"):
        recordings.play(key, lambda _, key=key: stream.put(lambda: done.append(key)))  # type: ignore[misc]
        stream.synchronize()
    assert done == ["a", "a", "b", "b", "a", "c", "c"]
    assert recordings.captured() == ["a", "c"]


def test_a_context_that_cannot_be_captured_runs_plainly(
    directory: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostEngine, "capturable", False)
    runtime = load(directory)
    found = runtime.generate(PROMPTS[0], max_tokens=20)
    assert not graphs_of(runtime)
    assert found == Runtime.load(directory, backend="onnxruntime").generate(PROMPTS[0], max_tokens=20)


def test_more_loops_and_tokens_allocate_nothing(directory: Path, device: HostDevice) -> None:
    driver = load(directory).driver(2)
    assert driver.state.state_bytes == driver.manifest.state_bytes(2)
    held, made = list(device.live), device.made
    for loops in (1, 4, 16):
        driver.reset()
        for tokens in (PROMPTS[:2], [[5], [6]], [[7], []], [[8], [9]]):
            driver.append(tokens, settings(loops))
        assert device.live == held
        assert device.made == made == 2


def test_a_state_that_is_dropped_gives_its_memory_back(directory: Path, device: HostDevice) -> None:
    gc.collect()
    gc.disable()
    try:
        driver = load(directory).driver()
        for token in (5, 6, 7):
            driver.append([[token]], settings())
        assert device.live
        del driver
        assert device.live == []
    finally:
        gc.enable()


def test_too_little_memory_is_refused_with_both_figures_before_any_is_taken(
    directory: Path, device: HostDevice
) -> None:
    runtime = load(directory)
    small = runtime.driver(1)
    device.total = 200_000
    free = device.memory()[0]
    with pytest.raises(BackendError, match=rf"batch of 8 needs [0-9,]+ bytes .* {free:,} are free on host memory"):
        runtime.driver(8)
    assert len(device.live) == 2
    small.append([[5]], settings())


@pytest.mark.parametrize("kind", ["device", "pinned"])
def test_an_allocation_that_fails_leaves_nothing_allocated(directory: Path, device: HostDevice, kind: str) -> None:
    runtime = load(directory)
    device.fails = kind
    with pytest.raises(BackendError, match="cudaErrorMemoryAllocation"):
        runtime.driver()
    assert device.live == []


def test_an_engine_larger_than_the_free_memory_is_refused(directory: Path, device: HostDevice) -> None:
    device.total = 10
    with pytest.raises(BackendError, match=r"needs [0-9,]+ bytes of device memory for its weights, 10 are free"):
        load(directory)


def test_a_batch_above_the_engines_is_refused(spoilt: Path, device: HostDevice) -> None:
    spec = add_plans(spoilt)
    add_plans(spoilt, profiles=tuple(replace(profile, batch=(1, 1, 2)) for profile in spec.profiles))
    with pytest.raises(ArgumentError, match="batch is 3; engine double was built for 1 to 2 sequences"):
        load(spoilt).driver(3)


def test_a_chunk_above_the_engines_is_refused_and_the_state_stays(spoilt: Path, device: HostDevice) -> None:
    spec = add_plans(spoilt)
    add_plans(spoilt, profiles=tuple(replace(profile, chunk=(1, 1, 4)) for profile in spec.profiles))
    driver = load(spoilt).driver()
    driver.append([[5, 6, 7]], settings())
    before = states(driver)
    for threshold in (1.0, 0.5):
        with pytest.raises(ArgumentError, match=r"chunk 8 .* are beyond what the engine was built for: .* chunk 4"):
            driver.append([list(range(5, 13))], settings(4, threshold))
    assert driver.lengths.tolist() == [3]
    after = states(driver)
    assert all(np.array_equal(after[name], values) for name, values in before.items())


def test_a_run_that_fails_says_why_and_counts_no_token(
    directory: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = load(directory).driver()
    driver.append([[5, 6, 7]], settings())
    monkeypatch.setattr(HostEngine, "fails", True)
    with pytest.raises(BackendError, match="TensorRT-RTX failed in embed: enqueue failed"):
        driver.append([[8]], settings())
    assert (driver.lengths.tolist(), len(driver.depth[0])) == ([3], 3)
    monkeypatch.setattr(HostEngine, "fails", False)
    other = Runtime.load(directory, backend="onnxruntime").driver()
    other.append([[5, 6, 7]], settings())
    np.testing.assert_allclose(driver.append([[8]], settings()), other.append([[8]], settings()), rtol=1e-4, atol=1e-5)


def test_a_shape_that_is_refused_is_named(directory: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostContext, "set_input_shape", lambda *_: False)
    with pytest.raises(BackendError, match=r"TensorRT-RTX refuses shape \(1, 1\) of input_ids in embed"):
        load(directory).driver().append([[5]], settings())


def test_the_first_engine_that_runs_here_is_taken(spoilt: Path, device: HostDevice) -> None:
    add_plans(spoilt, "double", version="1.6.0")
    add_plans(spoilt, "other", flavour="tensorrt")
    add_plans(spoilt, "turing", compute_capabilities=("7.5",))
    with pytest.raises(BackendError, match=r"no engine of .* runs here: double was built with .*1\.6\.0, here is 1\.7"):
        load(spoilt)
    add_plans(spoilt, "right")
    assert load(spoilt).backend.engine == "right"  # type: ignore[attr-defined]


def test_auto_and_tensorrt_by_name_take_the_same_engine(spoilt: Path, device: HostDevice) -> None:
    add_plans(spoilt, "double", source="other graphs")
    add_plans(spoilt, "a-int4", weights="int4")
    add_plans(spoilt, "b-turing", compute_capabilities=("7.5",))
    for right in ("a-int4", "c-right"):
        if right != "a-int4":
            add_plans(spoilt, right)
        package = Package.open(spoilt)
        manifest = package.manifest
        environment = Environment(
            manifest.dialect,
            manifest.precision,
            manifest.engines,
            source_hash(manifest),
            devices=(HostDevice.capability,),
            libraries={"tensorrt-rtx": HostTensorRT.__version__},
            cuda_bindings=True,
        )
        assert choices(environment)[0].engine == right
        assert TensorRTBackend(package).engine == right


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1.6.0"}, r"built with tensorrt-rtx 1\.6\.0, here is 1\.7\.1; build it again with: melt-run"),
        ({"compute_capabilities": ("12.0",)}, r"for compute capability 12\.0, this device has 8\.9; build it again"),
        ({"flavour": "tensorrt"}, r"TensorRT is not installed"),
    ],
)
def test_an_engine_for_something_else_is_refused(
    spoilt: Path, device: HostDevice, changes: dict[str, Any], message: str
) -> None:
    add_plans(spoilt, **changes)
    for engine in (None, "double"):
        with pytest.raises(BackendError, match=message):
            load(spoilt, engine=engine)


def test_a_changed_byte_in_a_plan_is_refused(spoilt: Path, device: HostDevice) -> None:
    plan = spoilt / "engines" / "double" / "loop_step.plan"
    plan.write_bytes(plan.read_bytes().replace(b"4096", b"4097"))
    with pytest.raises(PackageError, match=r"loop_step\.plan was changed"):
        load(spoilt)


def test_a_plan_that_the_library_cannot_read_is_refused_in_its_words(
    directory: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostTensorRT.Runtime, "deserialize_cuda_engine", lambda self, _: None)
    with pytest.raises(BackendError, match=r"TensorRT-RTX 1\.7\.1 cannot load .*embed\.plan: the library gave no reas"):
        load(directory)


def test_a_package_without_engines_says_how_to_build_one(tiny_package: Path) -> None:
    with pytest.raises(PackageError, match=r"it has none; build one with melt-run build-engine"):
        Runtime.load(tiny_package, backend="tensorrt")


def test_an_unknown_engine_is_refused_before_a_device_is_looked_for(directory: Path) -> None:
    with pytest.raises(PackageError, match="no engine 'other': it has double"):
        Runtime.load(directory, backend="tensorrt", engine="other")


def test_buffers_lie_aligned_and_apart() -> None:
    offsets, total = layout({"a": 1, "b": 256, "c": 300})
    assert (offsets, total) == ({"a": 0, "b": 256, "c": 512}, 1024)


def test_bfloat16_bits_become_exactly_their_float32() -> None:
    import ml_dtypes

    values = np.random.default_rng(0).normal(size=100).astype(ml_dtypes.bfloat16)
    assert np.array_equal(widened(values.view(np.uint16)), values.astype(np.float32))


def test_a_measurement_waits_for_what_the_device_computes(
    directory: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, waiting = load(directory).driver(), list[int]()
    stream = driver.state.stream  # type: ignore[attr-defined]

    def looked() -> float:
        waiting.append(len(stream.waiting))
        return 0.0

    stream.synchronize()
    monkeypatch.setattr(stopwatch, "perf_counter", looked)
    Stopwatch(driver).decode(10, 2, 3)
    Stopwatch(driver).prefill(20, 8, 2)
    assert waiting
    assert set(waiting) == {0}
