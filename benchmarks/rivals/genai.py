"""onnxruntime-genai: its own builder's export, and how it is run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rivals.turns import Sample
from rivals.weights import onnx_weights

# Activations in 8 bits and a head in 4 are its defaults for a CPU; in blocks of 128 it is faster than in its default of
# 32 or in 64, and takes as many bytes as the other rivals within 6%.
BUILDER = ("-p", "int4", "-e", "cpu")
BLOCKS = "block_size=128"


def missing() -> str | None:
    """Return what to install, in one sentence; None if it is there."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return "onnxruntime-genai is not installed; run: pip install 'melt-export[bench]'"
    return None


def build(llama: Path, output: Path) -> Path:
    """Have its builder export a Llama checkpoint in int4, unless the output exists. Raises RuntimeError."""
    if output.is_dir():
        return output
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "smol", "-i", str(llama)]
    command += ["-o", str(output), *BUILDER]
    ran = subprocess.run(
        [*command, "--extra_options", BLOCKS, "hf_token=false", "hf_remote=false"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["its builder failed"])[-1]
        raise RuntimeError(f"onnxruntime-genai: {reason}")
    return output


def about(directory: Path) -> dict[str, Any]:
    """Return the version, options, and the bits of the weights."""
    return {
        "version": version("onnxruntime-genai"),
        "options": f"exported with {' '.join(BUILDER)} and {BLOCKS}; intra_op_num_threads and "
        "intra_op.allow_spinning as in the table, fp32 cache, greedy",
        "weights": onnx_weights(directory),
    }


def logits(directory: Path) -> Callable[[list[int]], NDArray[np.float32]]:
    """Return a function that computes the logits (tokens, vocab) of a sequence of ids."""
    import onnxruntime_genai as og

    model = og.Model(str(directory))

    def run_sequence(ids: list[int]) -> NDArray[np.float32]:
        options = og.GeneratorParams(model)
        options.set_search_options(max_length=len(ids) + 1)
        running = og.Generator(model, options)
        running.append_tokens(np.asarray(ids, np.int32))
        return np.array(running.get_output("logits")[0], np.float32)

    return run_sequence


def run(directory: Path, threads: int, spin: bool, context: int, tokens: int, prompt: int) -> Iterator[Sample]:
    """Run an exported model. ``spin``: waiting threads stay awake for a while, its default."""
    import onnxruntime_genai as og

    session = {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": str(int(spin))}
    config = og.Config(str(directory))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)
    longest = max(context, prompt) + tokens + 2

    def generator() -> Any:
        options = og.GeneratorParams(model)
        options.set_search_options(max_length=longest, min_length=longest, do_sample=False)
        return og.Generator(model, options)

    while True:
        sample: Sample = {}
        if prompt:
            running, ids = generator(), np.arange(1, prompt + 1, dtype=np.int32)
            started = perf_counter()
            running.append_tokens(ids)
            running.generate_next_token()
            sample["prefill_s"] = perf_counter() - started
        running, times = generator(), []
        running.append_tokens(np.arange(1, max(context, 1) + 1, dtype=np.int32))
        running.generate_next_token()
        for _ in range(tokens):
            started = perf_counter()
            running.generate_next_token()
            times.append(perf_counter() - started)
        token = float(np.median(times))
        yield sample | {"token_s": token, "loop_s": token}
