"""How long a decoded token and a prompt take, beside the time that the memory's bandwidth alone allows.

TensorRT's steps are timed with CUDA events on its stream, others until the logits are on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from common import machine, resident
from melt_models import MeltForCausalLM
from melt_models.cache import MeltCache
from melt_models.checkpoint import load_model
from melt_runtime import LoopSettings, Runtime
from melt_runtime.backends.cuda import Device
from melt_runtime.backends.tensorrt import TensorRTState
from melt_runtime.package.manifest import Manifest
from melt_runtime.package.reader import Package

from melt_export.graph.external_weights import external_bytes

_COPIES = 20
Measured = tuple[str, str, dict[str, Any]]  # what was measured, a sentence, and the figures behind it


def facts(device: Device | None) -> dict[str, Any]:
    """Describe the card, or the host."""
    if device is None:
        return machine()
    driver = Path("/proc/driver/nvidia/version")
    words = driver.read_text(encoding="utf-8", errors="replace").split() if driver.is_file() else []
    free, total = device.memory()
    return {
        "card": device.name,
        "compute_capability": device.capability,
        "driver": next((word for word in words if word.count(".") in (1, 2) and word[0].isdigit()), "unknown"),
        "driver_cuda": device.driver,
        "memory_bytes": total,
        "free_bytes": free,
    }


def memory_used(device: Device | None) -> int:
    """Return the bytes in use on the device, other processes' too, or by this process on the host."""
    if device is None:
        return resident("VmRSS")
    free, total = device.memory()
    return total - free


def bandwidth(device: Device | None, size: int) -> dict[str, Any]:
    """Measure copies of ``size`` bytes within the memory; each byte counts as read and as written."""
    if device is None:
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        return copied(size, timed(lambda: np.copyto(target, source), _COPIES), "copies in host memory, one thread")
    stream, blocks = device.stream(), [device.allocate(size) for _ in range(2)]
    copy = lambda: stream.copy(blocks[1].address, blocks[0].address, size)  # noqa: E731
    return copied(size, timed(copy, _COPIES, stream), "copies on the device, CUDA events")


def copied(size: int, seconds: list[float], how: str) -> dict[str, Any]:
    """Return the bandwidth of the median copy."""
    rate = 2 * size / float(np.median(seconds))
    return {"bytes_per_second": rate, "how": f"median of {len(seconds)} {how}, {size / 1e6:,.0f} MB each"}


def timed(step: Callable[[], object], steps: int, stream: Any = None) -> list[float]:
    """Return the seconds of each step, by CUDA events where there is a stream.

    Three more run first: one settles a library's choices, one is captured as a graph, one is the first replay.
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


def times(
    runtime: Runtime, read_bytes: tuple[int, int], rate: float, cached: tuple[int, ...], steps: int
) -> Iterator[Measured]:
    """Time tokens decoded behind so many ``cached`` ones, and a prompt of four chunks.

    ``read_bytes``: see ``weight_bytes``. ``rate``: the memory's bytes per second.
    """
    manifest, driver = runtime.manifest, runtime.driver()
    stream = driver.state.stream if isinstance(driver.state, TensorRTState) else None
    loops = LoopSettings(manifest.loops)
    for tokens in sorted({min(count, manifest.max_seq_len - 1) for count in cached}):

        def step(tokens: int = tokens) -> None:
            driver.assume(0, tokens, manifest.loops)
            driver.append([[1]], loops)

        yield decoded(manifest, read_bytes, tokens, timed(step, steps, stream), stream is not None, rate)
    prompt = prompt_of(manifest, 4)

    def prefill() -> None:
        driver.reset()
        driver.append([prompt], loops)

    yield prefilled(manifest, len(prompt), timed(prefill, max(2, steps // 4), stream), stream is not None)


def pytorch_times(
    checkpoint: Path, manifest: Manifest, device: str, read_bytes: tuple[int, int], rate: float, steps: int
) -> Iterator[Measured]:
    """Time the model in eager PyTorch, in the package's precision (on a CPU in float32)."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = torch.float32 if device == "cpu" else half.get(manifest.precision, torch.float32)
    model = load_model(checkpoint)
    assert isinstance(model, MeltForCausalLM)
    model = model.to(device=device, dtype=dtype).eval()  # type: ignore[call-arg, call-overload, arg-type]

    def run(ids: list[int], cache: MeltCache) -> None:
        options = {"num_loops": manifest.loops, "chunk_size": manifest.chunk, "exit_threshold": 1.0}
        tokens = torch.tensor([ids], device=device)
        model(tokens, past_key_values=cache, logits_to_keep=1, **options).logits.float().cpu()

    tokens = min(128, manifest.max_seq_len // 2)
    with torch.inference_mode():
        cache = MeltCache(model.config.num_hidden_layers)
        run((np.arange(tokens) % manifest.vocab_size).tolist(), cache)
        yield decoded(manifest, read_bytes, tokens, timed(lambda: run([1], cache), steps), False, rate)
        prompt = prompt_of(manifest, 1)
        reading = timed(lambda: run(prompt, MeltCache(model.config.num_hidden_layers)), max(2, steps // 4))
        yield prefilled(manifest, len(prompt), reading, False)


def prompt_of(manifest: Manifest, chunks: int) -> list[int]:
    """Return a prompt of whole chunks."""
    chunks = max(1, min(chunks, manifest.max_seq_len // manifest.chunk))
    return (np.arange(chunks * manifest.chunk) % manifest.vocab_size).tolist()  # type: ignore[no-any-return]


def moved_bytes(manifest: Manifest, read_bytes: tuple[int, int], tokens: int) -> int:
    """Return what a decoded token reads: the loop step's weights and the cache per loop, the head's weights once."""
    loop_step, head = read_bytes
    return manifest.loops * (loop_step + manifest.cache_bytes(tokens)) + head


def weight_bytes(package: Package) -> tuple[int, int]:
    """Return the bytes of weights that one run of the loop step and of the head read."""
    if (engine := next(iter(package.manifest.engines.values()), None)) is not None:  # its plans are little else
        return engine.files["loop_step"].bytes, engine.files["lm_head"].bytes
    loop_step, head = (external_bytes([ir.load(package.path(graph))]) for graph in ("loop_step", "lm_head"))
    return loop_step, head


def decoded(
    manifest: Manifest, read_bytes: tuple[int, int], tokens: int, seconds: list[float], events: bool, rate: float
) -> Measured:
    """Describe the times of decoded tokens, beside the least that the bandwidth allows."""
    low, middle, high = map(float, np.percentile(seconds, [25, 50, 75]))
    moved = moved_bytes(manifest, read_bytes, tokens)
    least = moved / rate
    detail = (
        f"{middle * 1e3:,.2f} ms per token of {manifest.loops} loops ({1 / middle:,.1f} tokens/s), {tokens:,} in the "
        f"cache; {moved / 1e6:,.1f} MB moved: {least * 1e3:,.2f} ms at full bandwidth, {least / middle:.0%} reached"
    )
    figures = {
        "tokens_in_cache": tokens,
        "loops": manifest.loops,
        "steps": len(seconds),
        "median_seconds": middle,
        "quartile_seconds": [low, high],
        "moved_bytes": moved,
        "seconds_at_bandwidth": least,
        "clock": clock(events),
    }
    return "decode", detail, figures


def prefilled(manifest: Manifest, tokens: int, seconds: list[float], events: bool) -> Measured:
    """Describe the times of a prompt."""
    middle = float(np.median(seconds))
    rate, chunk = f"{tokens / middle:,.0f} tokens/s", manifest.chunk
    detail = f"{middle * 1e3:,.1f} ms for {tokens:,} tokens in chunks of {chunk} ({rate})"
    figures = {"tokens": tokens, "chunk": chunk, "loops": manifest.loops, "steps": len(seconds)}
    return "prefill", detail, {**figures, "median_seconds": middle, "clock": clock(events)}


def clock(events: bool) -> str:
    """Return how times were taken."""
    return "CUDA events" if events else "wall time until the logits are on the host"
