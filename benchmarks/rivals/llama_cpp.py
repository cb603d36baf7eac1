"""llama.cpp: its prebuilt library from npm, SmolLM2's weights in 4 bits everywhere, and how they are run.

Q4_0 is the 4-bit kind that it runs fastest on a CPU: it repacks these weights for the processor's vector instructions.
On two cores of an AMD EPYC, Q4_1, in which the weights come, took about twice as long.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rivals.llama_library import Q4_0, LlamaContext, LlamaLibrary
from rivals.turns import Sample

_VERSION = "3.22.1"  # of node-llama-cpp; llama_library.py checks that it knows what is inside
_BUILDS = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}
_BITS = "int4, blocks of 32, float16 scales"  # Q4_0
_ROWS, _BATCH = 1024, 512  # positions in the cache; most tokens per step
OPTIONS = (
    f"context of {_ROWS:,} tokens, batches of up to {_BATCH}, thread pool, flash attention auto, float16 cache, "
    "Q4_0 repacked, 8-bit activations, greedy"
)


def libraries(directory: Path) -> Path:
    """Return where ``install`` puts the shared libraries. Raises RuntimeError on a system without a prebuilt one."""
    build = _BUILDS.get(platform.machine()) if platform.system() == "Linux" else None
    if build is None:
        raise RuntimeError(f"llama.cpp has no prebuilt CPU library here for {platform.system()} {platform.machine()}")
    return directory / "node_modules" / "@node-llama-cpp" / build / "bins" / build


def missing(directory: Path) -> str | None:
    """Return why the library cannot be had, in one sentence; None if it is there or npm can fetch it."""
    try:
        found = libraries(directory)
    except RuntimeError as error:
        return str(error)
    if found.is_dir() or shutil.which("npm"):
        return None
    return "npm, which fetches llama.cpp's prebuilt library, is not installed; install Node.js"


def install(directory: Path) -> Path:
    """Fetch the prebuilt library with npm unless it is there; return its directory. Raises RuntimeError."""
    found = libraries(directory)
    if reason := missing(directory):
        raise RuntimeError(reason)
    if found.is_dir():
        return found
    directory.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--prefix", str(directory), "--ignore-scripts", "--no-audit", "--no-fund"]
    command.append(f"@node-llama-cpp/{found.name}@{_VERSION}")
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode or not found.is_dir():
        raise RuntimeError(f"npm could not fetch llama.cpp: {' '.join(ran.stderr.split()) or 'nothing was installed'}")
    return found


def quantize(library: Path, source: Path, output: Path) -> Path:
    """Write a GGUF file in Q4_0, embedding and head included, unless it exists. Raises RuntimeError."""
    if not output.is_file():
        part = output.with_suffix(".part")
        LlamaLibrary(library).quantize(source, part, Q4_0)
        part.replace(output)
    return output


def about(library: Path, weights: Path) -> dict[str, Any]:
    """Return the version, where it is from, options, and the bits of the weights."""
    from gguf import GGUFReader

    bits: dict[str, set[str]] = {}
    total = 0
    for tensor in GGUFReader(weights).tensors:
        part = {"token_embd": "embedding", "output": "head"}.get(tensor.name.rpartition(".")[0], "layers")
        total += int(tensor.n_bytes)
        if tensor.data.ndim > 1:
            kind = tensor.tensor_type.name
            bits.setdefault(part, set()).add(_BITS if kind == "Q4_0" else kind)
    bits.setdefault("head", bits["embedding"])  # tied
    opened = LlamaLibrary(library)
    package = json.loads((library.parents[1] / "package.json").read_text(encoding="utf-8"))
    return {
        "version": f"{opened.version} ({package['name']} {package['version']})",
        "options": f"{OPTIONS}; {opened.features}",
        "weights": {part: " and ".join(sorted(kinds)) for part, kinds in bits.items()} | {"bytes": total},
    }


def run(
    library: Path, weights: Path, threads: int, poll: bool, context: int, tokens: int, prompt: int
) -> Iterator[Sample]:
    """Run a GGUF file in llama.cpp. ``poll``: waiting threads stay awake for a while, its default."""
    running = LlamaContext(LlamaLibrary(library), weights, threads, _ROWS, _BATCH, poll=poll)
    while True:
        yield _turn(running, context, tokens, prompt)


def logits(library: Path, weights: Path) -> Callable[[list[int]], NDArray[np.float32]]:
    """Return a function that computes the logits (tokens, vocab) of a sequence of at most 512 ids."""
    running = LlamaContext(LlamaLibrary(library), weights, 1, _ROWS, _BATCH, poll=False)

    def run_sequence(ids: list[int]) -> NDArray[np.float32]:
        running.cut(0)
        return running.logits(ids)

    return run_sequence


def _turn(running: LlamaContext, context: int, tokens: int, prompt: int) -> Sample:
    sample: Sample = {}
    if prompt:
        running.cut(0)
        started = perf_counter()
        running.next(list(range(1, prompt + 1)))
        sample["prefill_s"] = perf_counter() - started
    running.cut(0)
    times, token = [], running.next(list(range(1, max(context, 1) + 1)))
    for _ in range(tokens + 1):
        started = perf_counter()
        token = running.next([token])
        times.append(perf_counter() - started)
    running.rest()
    seconds = float(np.median(times[1:]))
    return sample | {"token_s": seconds, "loop_s": seconds}
