"""How long a token and a prompt take, beside the time that the memory's bandwidth alone allows.

TensorRT's steps are timed with CUDA events on its stream. Elsewhere times are wall times that end when the logits are
on the host, which waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from melt_models import MeltForCausalLM
from melt_models.cache import MeltCache
from melt_models.checkpoint import load_model
from melt_runtime import LoopSettings, Runtime
from melt_runtime.backends.tensorrt import TensorRTState
from melt_runtime.package.manifest import Manifest

from .checks import Row
from .report import MEASURED, Result


def moved_bytes(manifest: Manifest, loop_weights: int, head_weights: int, loops: int, tokens: int) -> int:
    """What one decoded token must read: the loop step's weights and the cache's rows once a loop, the head once."""
    return loops * (loop_weights + manifest.cache_bytes(tokens)) + head_weights


def decode(runtime: Runtime, weights: tuple[int, int], tokens: int, steps: int, bandwidth: float, row: Row) -> Result:
    """One token after ``tokens`` in the cache. weights: bytes of loop step and head."""
    driver, settings = runtime.driver(), LoopSettings(runtime.manifest.loops)

    def step() -> None:
        driver.lengths[...] = tokens  # what the rows hold does not matter for time
        driver.append([[1]], settings)

    stream = stream_of(driver.state)
    times = timed(step, steps, stream)
    return _decoded(runtime.manifest, weights, tokens, times, clock_of(stream), bandwidth, row)


def prefill(runtime: Runtime, chunks: int, steps: int, row: Row) -> Result:
    """A prompt of whole chunks, from an empty cache to the logits after it."""
    manifest = runtime.manifest
    chunks = max(1, min(chunks, manifest.max_seq_len // manifest.chunk))
    prompt = (np.arange(chunks * manifest.chunk) % manifest.vocab_size).tolist()
    driver, settings = runtime.driver(), LoopSettings(manifest.loops)

    def step() -> None:
        driver.reset()
        driver.append([prompt], settings)

    stream = stream_of(driver.state)
    return _prefilled(manifest, len(prompt), timed(step, steps, stream), clock_of(stream), row)


def pytorch(
    checkpoint: Path,
    manifest: Manifest,
    device: str,
    weights: tuple[int, int],
    tokens: int,
    chunks: int,
    steps: int,
    bandwidth: float,
    row: Row,
) -> list[Result]:
    """The same two of the model in PyTorch, eager, in the package's precision (on a CPU in float32)."""
    model = load_model(checkpoint)
    assert isinstance(model, MeltForCausalLM)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = torch.float32 if device == "cpu" else half.get(manifest.precision, torch.float32)
    model = model.to(device=device, dtype=dtype).eval()  # type: ignore[call-arg, call-overload, arg-type]
    chunks = max(1, min(chunks, manifest.max_seq_len // manifest.chunk))

    def run(ids: list[int], cache: MeltCache) -> None:
        output = model(
            torch.tensor([ids], device=device),
            past_key_values=cache,
            num_loops=manifest.loops,
            chunk_size=manifest.chunk,
            exit_threshold=1.0,
            logits_to_keep=1,
        )
        output.logits.float().cpu()

    def empty() -> MeltCache:
        return MeltCache(model.config.num_hidden_layers)

    prompt = (np.arange(chunks * manifest.chunk) % manifest.vocab_size).tolist()
    with torch.inference_mode():
        cache = empty()
        run((np.arange(tokens) % manifest.vocab_size).tolist(), cache)
        decoding = timed(lambda: run([1], cache), steps)
        reading = timed(lambda: run(prompt, empty()), max(2, steps // 4))
    return [
        _decoded(manifest, weights, tokens, decoding, clock_of(None), bandwidth, row),
        _prefilled(manifest, len(prompt), reading, clock_of(None), row),
    ]


def timed(step: Callable[[], None], steps: int, stream: Any = None) -> list[float]:
    """Seconds of each of several steps, after three that are not counted; by CUDA events where there is a stream.

    The first run settles a library's choices, the second is captured as a graph, the third is the first replay.
    """
    times = []
    for _ in range(steps + 3):
        began = time.perf_counter() if stream is None else stream.record()
        step()
        if stream is None:
            times.append(time.perf_counter() - began)
            continue
        ended = stream.record()
        ended.wait()
        times.append(ended.since(began) / 1e3)
    return times[3:]


def stream_of(state: Any) -> Any:
    """The stream on which all of a state's work is; None where the backend has none of its own (ONNX Runtime)."""
    return state.stream if isinstance(state, TensorRTState) else None


def clock_of(stream: Any) -> str:
    """How times were taken."""
    return "CUDA events" if stream is not None else "wall time until the logits are on the host"


def _decoded(
    manifest: Manifest,
    weights: tuple[int, int],
    tokens: int,
    times: list[float],
    clock: str,
    bandwidth: float,
    row: Row,
) -> Result:
    moved = moved_bytes(manifest, *weights, manifest.loops, tokens)
    low, middle, high = np.percentile(times, [25, 50, 75])
    least = moved / bandwidth
    detail = (
        f"{middle * 1e3:,.2f} ms a token of {manifest.loops} loops ({1 / middle:,.1f} tokens/s), {tokens:,} in the "
        f"cache; {moved / 1e6:,.1f} MB moved: {least * 1e3:,.2f} ms at full bandwidth, {least / middle:.0%} reached"
    )
    figures: dict[str, Any] = {
        "tokens_in_cache": tokens,
        "loops": manifest.loops,
        "steps": len(times),
        "median_seconds": float(middle),
        "quartile_seconds": [float(low), float(high)],
        "moved_bytes": moved,
        "seconds_at_bandwidth": least,
        "clock": clock,
    }
    return row("decode", MEASURED, detail, figures)


def _prefilled(manifest: Manifest, tokens: int, times: list[float], clock: str, row: Row) -> Result:
    middle = float(np.median(times))
    detail = (
        f"{middle * 1e3:,.1f} ms for {tokens:,} tokens in chunks of {manifest.chunk} ({tokens / middle:,.0f} tokens/s)"
    )
    figures = {
        "tokens": tokens,
        "chunk": manifest.chunk,
        "loops": manifest.loops,
        "steps": len(times),
        "median_seconds": middle,
        "clock": clock,
    }
    return row("prefill", MEASURED, detail, figures)
