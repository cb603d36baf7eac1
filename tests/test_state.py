"""State is allocated once, rewritten in place, and the same for any number of loops."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import LoopDriver, LoopSettings, Runtime

DIALECTS = ("onnxruntime", "standard", "portable")


def addresses(driver: LoopDriver) -> dict[str, int]:
    """Where every state buffer lies."""
    return {name: buffer.ctypes.data for name, buffer in driver.state.buffers.items()}  # type: ignore[attr-defined]


@pytest.fixture(params=DIALECTS)
def runtime(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> Runtime:
    return Runtime.load(make_package(make_checkpoint(), dialect=request.param))


def test_more_loops_allocate_nothing(runtime: Runtime) -> None:
    driver = runtime.driver()
    before, size = addresses(driver), driver.state.state_bytes
    assert size == runtime.state_bytes(1)
    for loops in (1, 4, 16):
        driver.reset()
        driver.append([[5, 6, 7, 8, 9]], LoopSettings(loops))
        driver.append([[10]], LoopSettings(loops))
        assert addresses(driver) == before
        assert driver.state.state_bytes == size
        assert driver.depth[0] == [loops] * 6


def test_the_state_is_what_the_manifest_says(runtime: Runtime) -> None:
    manifest = runtime.manifest
    cache = 2 * 2 * 2 * manifest.cache_rows * 16 * 4  # layers, key and value, kv heads, rows, head_dim, float32
    swapped = 2 * (8 * 64 + 2 * 8 * 64) * 4  # two buffers of hidden and latent for a chunk of 8
    rows = 2 * 2 * 2 * 8 * 16 * 4 if manifest.dialect == "portable" else 0
    assert runtime.state_bytes(1) == cache + swapped + rows
    assert runtime.manifest.cache_bytes(100) == 2 * 2 * 2 * 100 * 16 * 4


def test_a_loop_rewrites_the_tokens_row_and_no_other(runtime: Runtime) -> None:
    driver = runtime.driver()
    driver.append([[5, 6, 7]], LoopSettings(2))
    names = [s.input for s in runtime.manifest.states if s.kind != "swap"]
    before = {name: driver.state.read(name) for name in names}
    driver.append([[8]], LoopSettings(4))
    for name in names:
        after = driver.state.read(name)
        changed = np.flatnonzero((after != before[name]).any(axis=(0, 1, 3)))
        assert changed.tolist() == [3]


def test_caches_are_bound_to_one_buffer_as_input_and_output(tiny_package: Path) -> None:
    driver = Runtime.load(tiny_package).driver()
    driver.append([[5, 6, 7]], LoopSettings(1))
    driver.append([[8]], LoopSettings(1))
    state = driver.state
    binding = next(b for key, b in state.bindings.items() if key[0] == "loop_step")  # type: ignore[attr-defined]
    outputs = {value.data_ptr() for value in binding.get_outputs()}
    for spec in state.manifest.states:  # type: ignore[attr-defined]
        if spec.kind == "in_place":
            assert addresses(driver)[spec.input] in outputs


def test_hidden_and_latent_swap_between_two_buffers(runtime: Runtime) -> None:
    driver = runtime.driver()
    (chunk,) = driver.chunks([[5, 6, 7]])
    seen = []
    for _ in driver.loops(chunk, LoopSettings(4)):
        seen.append(driver.state.read("hidden"))
    names = addresses(driver)
    assert {"hidden/0", "hidden/1", "latent.0/0", "latent.0/1", "latent.1/0", "latent.1/1"} <= set(names)
    assert not np.array_equal(seen[0], seen[1])
    buffers = driver.state.buffers  # type: ignore[attr-defined]
    last = [buffers[f"hidden/{i}"].view(np.float32)[: seen[-1].size].reshape(seen[-1].shape) for i in (0, 1)]
    assert any(np.array_equal(side, seen[-1]) for side in last)
    assert any(np.array_equal(side, seen[-2]) for side in last)


def test_a_token_that_left_keeps_hidden_latent_and_rows(runtime: Runtime) -> None:
    driver = runtime.driver()
    (chunk,) = driver.chunks([[5, 6, 7, 8, 9, 10]])
    before: dict[str, np.ndarray] = {}
    left = np.zeros((1, 6), bool)
    froze = 0
    caches = [s for s in runtime.manifest.states if s.kind != "swap"]
    for control in driver.loops(chunk, LoopSettings(4, exit_threshold=0.8)):
        now = {"hidden": driver.state.read("hidden")[0]}
        now["latent"] = driver.state.read("latent")[:, 0].transpose(1, 0, 2)
        for spec in caches:
            name = spec.output if spec.kind == "read_only" else spec.input
            now[name] = driver.state.read(name, (0, slice(None), slice(0, 6))).transpose(1, 0, 2)
        left = ~control.active
        if before:
            for name, value in now.items():
                assert np.array_equal(value[left[0]], before[name][left[0]])
            froze += int(left.sum())
        before = now
    assert froze > 0


def test_one_sequence_leaving_early_changes_no_other(runtime: Runtime) -> None:
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
    together = runtime.driver(3)
    logits = together.append(prompts, LoopSettings(4, exit_threshold=0.85))
    assert len({tuple(depth) for depth in together.depth}) > 1
    for slot, prompt in enumerate(prompts):
        alone = runtime.driver(1)
        own = alone.append([prompt], LoopSettings(4, exit_threshold=0.85))
        assert alone.depth[0] == together.depth[slot]
        np.testing.assert_allclose(own[0], logits[slot], rtol=1e-4, atol=1e-5)


def test_an_idle_sequence_keeps_its_rows(runtime: Runtime) -> None:
    driver = runtime.driver(2)
    driver.append([[5, 6, 7], [8, 9, 10]], LoopSettings(4))
    caches = [s.input for s in runtime.manifest.states if s.kind != "swap"]
    before = {name: driver.state.read(name, (0, slice(None), slice(0, 3))) for name in caches}
    for token in (11, 12, 13):
        driver.append([[], [token]], LoopSettings(4))
    assert driver.lengths.tolist() == [3, 6]
    for name, rows in before.items():
        assert np.array_equal(driver.state.read(name, (0, slice(None), slice(0, 3))), rows)


def test_a_full_sequence_may_sit_beside_one_that_goes_on(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    for dialect in DIALECTS:
        runtime = Runtime.load(make_package(make_checkpoint(), dialect=dialect, max_seq_len=16, max_batch=2))
        driver = runtime.driver(2)
        rng = np.random.default_rng(0)
        full, short = rng.integers(3, 50, 16).tolist(), [4]
        driver.append([full, short], LoopSettings(2))
        caches = [s.input for s in runtime.manifest.states if s.kind != "swap"]
        before = {name: driver.state.read(name, (0, slice(None), slice(0, 16))) for name in caches}
        more = rng.integers(3, 50, 15).tolist()
        logits = driver.append([[], more], LoopSettings(2))
        for name, rows in before.items():
            assert np.array_equal(driver.state.read(name, (0, slice(None), slice(0, 16))), rows)
        alone = runtime.driver(1)
        alone.append([short], LoopSettings(2))
        np.testing.assert_allclose(alone.append([more], LoopSettings(2))[0], logits[1], rtol=1e-4, atol=1e-5)


def test_resident_memory_stays_flat_over_two_thousand_tokens(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    checkpoint = make_checkpoint(max_position_embeddings=4096, eos_token_id=None)
    driver = Runtime.load(make_package(checkpoint, max_seq_len=4096, max_batch=1), threads=1).driver()
    process, settings = psutil.Process(), LoopSettings(2)
    driver.append([[5, 6, 7]], settings)
    for token in range(200):
        driver.append([[token % 40]], settings)
    before = process.memory_info().rss
    for token in range(2000):
        driver.append([[token % 40]], settings)
    assert int(driver.lengths[0]) == 2203
    # Attention's scratch for the scores grows by a few bytes a token; nothing may grow by a state.
    assert process.memory_info().rss - before < driver.state.state_bytes // 4


def test_the_runtime_needs_no_torch(tiny_package: Path) -> None:
    script = (
        "import sys\n"
        "from melt_runtime import Runtime\n"
        f"print(Runtime.load({str(tiny_package)!r}).generate('hello', max_tokens=4).finish_reason)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxscript', 'onnx_ir', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
