"""Measures what quantized weights and caches cost the MELT on text, and pipelined decoding; adds to docs/text.json.

    python benchmarks/experiments/text_quantized.py [--checkpoint examples/text-melt] [--sequences 2]

Weights are rounded to the nearest value (rtn), which needs no calibration.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from melt_models.atomic import write_text
from melt_runtime import Runtime
from melt_runtime.decoding.loop_driver import LoopSettings
from text_measure import held_out_sequences
from text_record import Figures, Sequences, decoded_perplexity, perplexity, read

from melt_export.export import building
from melt_export.options import CacheOptions, ExportOptions, WeightOptions

VARIANTS: dict[str, ExportOptions] = {
    "float32": ExportOptions(),
    "float16": ExportOptions(precision="fp16"),
    "int8 weights": ExportOptions(weights=WeightOptions("int8", method="rtn")),
    "int4 weights": ExportOptions(weights=WeightOptions("int4", method="rtn")),
    "int8 cache": ExportOptions(cache=CacheOptions("int8")),
    "int4 cache": ExportOptions(cache=CacheOptions("int4")),
}
LOOPS = (2, 4)
DECODED = 128


def measured(runtime: Runtime, texts: Sequences) -> Figures:
    """Return sizes, and perplexity read in the package's chunks and decoded, by loops."""
    found: Figures = {
        "weights_bytes": runtime.manifest.weights_bytes,
        "cache_bytes_per_token": runtime.manifest.cache_bytes(1),
    }
    for loops in LOOPS:
        settings = LoopSettings(loops)
        found[f"chunks, {loops} loops"] = round(perplexity(runtime, texts, settings), 3)
        found[f"decoded, {loops} loops"] = round(decoded_perplexity(runtime, texts, settings, DECODED), 3)
    return found


def pipelined(runtime: Runtime, prompts: Sequences, loops: int) -> Figures:
    """Write 64 tokens behind every prompt greedily, pipelined. ``held``: drafts that held, by their loop."""
    runs, tokens = 0, 0
    held, dropped = np.zeros((2, loops - 1), int)
    for ids in prompts:
        used = runtime.generate(ids, max_tokens=64, loops=loops, ignore_eos=True, pipeline="on").pipeline
        assert used is not None
        runs, tokens = runs + used.runs, tokens + used.tokens
        held += used.held[: loops - 1]
        dropped += used.dropped[: loops - 1]
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "runs_per_token": round(runs / tokens, 3),
        "held": held.tolist(),
        "dropped": dropped.tolist(),
    }


def main(
    checkpoint: Annotated[Path, typer.Option(help="The MELT.")] = Path("examples/text-melt"),
    data: Annotated[Path, typer.Option(help="Folder that text_data.py wrote.")] = Path("build/text/data"),
    sequences: Annotated[int, typer.Option(min=1, help="Held-out sequences per source.")] = 1,
    output: Annotated[Path, typer.Option(help="The file to add to.")] = Path("docs/text.json"),
) -> None:
    """Measure every variant that docs/text.json does not have."""
    content = read(output)
    files = [str(data / f"{name}-held-out.bin") for name in content["data"]["sources"]]
    held_out = held_out_sequences(files, content["length"], sequences)
    texts: Sequences = [ids.tolist() for source in held_out.values() for ids in source]
    for name, options in VARIANTS.items():
        if name in content["quantized"]:
            continue
        with tempfile.TemporaryDirectory(prefix="melt-text-") as place:
            package = Path(place, "package")
            with building(checkpoint, package, options):
                pass
            runtime = Runtime.load(package)
            content["quantized"][name] = measured(runtime, texts)
            if name == "float32":
                prompts = [np.fromfile(file, dtype=np.uint16)[3000:3064].tolist() for file in files]
                content["pipelined"] = {f"{loops} loops": pipelined(runtime, prompts, loops) for loops in LOOPS}
        write_text(output, json.dumps(content, indent=1) + "\n")
        print(name, content["quantized"][name], flush=True)


if __name__ == "__main__":
    typer.run(main)
