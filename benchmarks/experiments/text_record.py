"""Measures the MELTs that text_train.py trained, as packages in this project's runtime, and writes docs/text.json.

    python benchmarks/experiments/text_record.py [--root build/text/runs] [--data build/text/data] [--sequences 1]

For every main run after phase 1 and finished, and after text_decoding.py: perplexity by loops, by chunk size, and
decoding token by token. What training measured is copied. A figure that docs/text.json has is not measured again.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from melt_models.atomic import write_text
from melt_runtime import Runtime
from melt_runtime.decoding.loop_driver import LoopSettings
from numpy.typing import NDArray
from shared import machine, versions
from text_measure import held_out_sequences
from text_runs import COLUMNS, MAIN, ROWS, SEEDS

from melt_export.export import building
from melt_export.options import ExportOptions
from melt_export.parity.quality import text_logits, token_losses

# "gate": after phase 2 and the training of the exit gate, which is the finished MELT.
CHECKPOINTS = tuple(f"{run}-{seed}/{stage}" for run, stage in COLUMNS for seed in SEEDS)
CHUNKS = (1, 8, 32, 128, 512)
DECODED = 128  # tokens at the end of each sequence
Figures = dict[str, Any]
Sequences = list[list[int]]


def read(file: Path) -> Figures:
    """Return the content of docs/text.json, or an empty one."""
    if file.is_file():
        content: Figures = json.loads(file.read_text(encoding="utf-8"))
        return content
    return {"measured": {}, "training": {}, "quantized": {}}


def of_training(result: Figures) -> Figures:
    """Return what training recorded of a run."""
    kept = ("steps", "tokens", "seconds", "diverged", "shared", "loops", "chunks")
    stages = {name: {key: stage[key] for key in kept if key in stage} for name, stage in result["stages"].items()}
    for stage in stages.values():
        for curve in ("loops", "chunks"):
            stage[curve] = {setting: at["all"] for setting, at in stage.get(curve, {}).items()}
    about = ("row", "seed", "parameters", "device", "held_out_sequences")
    return {**{key: result[key] for key in about}, "stages": stages}


def of_decoding(root: Path) -> Figures:
    """Return what the runs of text_decoding.py took, or nothing where there are none: ``minutes`` of every seed."""
    files = [root / f"decoding-{seed}" / "metrics" / "phase2.jsonl" for seed in SEEDS]
    if not all(file.is_file() for file in files):
        return {}
    ends = [json.loads(file.read_text(encoding="utf-8").splitlines()[-1]) for file in files]
    minutes = " and ".join(f"{end['seconds'] / 60:.0f}" for end in ends)
    return {"steps": ends[0]["step"], "tokens": ends[0]["tokens"], "minutes": minutes}


def perplexity(runtime: Runtime, sequences: Sequences, settings: LoopSettings, last: int | None = None) -> float:
    """Return the perplexity of the sequences, or of their last tokens, read in chunks."""
    losses: list[float] = []
    driver = runtime.driver()
    for ids in sequences:
        rows = text_logits(driver, ids, settings)
        losses += token_losses(logs(rows), ids)[-(last or 0) :]
    return math.exp(float(np.mean(losses)))


def decoded_perplexity(runtime: Runtime, sequences: Sequences, settings: LoopSettings, last: int) -> float:
    """Return the perplexity of the last tokens, fed one by one behind the others, which are a prompt in chunks."""
    losses: list[float] = []
    driver = runtime.driver()
    for ids in sequences:
        driver.reset()
        split = len(ids) - last
        row = driver.append([ids[:split]], settings)[0]
        for token in ids[split:]:
            losses.append(-float(logs(row)[token]))
            row = driver.append([[token]], settings)[0]
    return math.exp(float(np.mean(losses)))


def logs(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log-probabilities along the last axis."""
    wide = rows.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def settings_of(depths: int) -> dict[str, dict[str, Any]]:
    """Return what is measured of a MELT: by name the function and its settings."""
    wanted: dict[str, dict[str, Any]] = {}
    for loops in range(1, depths + 1):
        wanted[f"decoded, {loops} loops"] = {"loops": loops, "decoded": True}
        wanted[f"the same tokens in chunks, {loops} loops"] = {"loops": loops, "last": DECODED}
    for size in CHUNKS:
        wanted[f"chunks of {size}, {depths} loops"] = {"loops": depths, "chunk": size}
    wanted[f"chunks of 1, {depths // 2} loops"] = {"loops": depths // 2, "chunk": 1}
    for loops in range(1, 2 * depths + 1):
        wanted[f"{loops} loops"] = {"loops": loops}
    return wanted


def one(runtime: Runtime, sequences: Sequences, wanted: dict[str, Any], own: int) -> float:
    """Measure one setting."""
    settings = LoopSettings(wanted["loops"], chunk=wanted.get("chunk", own))
    if wanted.get("decoded"):
        return round(decoded_perplexity(runtime, sequences, settings, DECODED), 3)
    return round(perplexity(runtime, sequences, settings, wanted.get("last")), 3)


def main(
    root: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("build/text/runs"),
    data: Annotated[Path, typer.Option(help="Folder that text_data.py wrote.")] = Path("build/text/data"),
    sequences: Annotated[int, typer.Option(min=1, help="Held-out sequences per source.")] = 1,
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("docs/text.json"),
) -> None:
    """Measure what has not been measured, and record it."""
    content = read(output)
    content["data"] = json.loads((data / "data.json").read_text(encoding="utf-8"))
    for row in (MAIN, *ROWS):
        for seed in SEEDS:
            result = root / f"{row.name}-{seed}" / "result.json"
            if result.is_file():
                told = json.loads(result.read_text(encoding="utf-8"))
                content["training"][f"{row.name}-{seed}"] = of_training(told)
                length = told["content"]["data"]["sequence_length"]
    content["decoding"] = of_decoding(root) or content.get("decoding", {})
    files = [str(data / f"{name}-held-out.bin") for name in content["data"]["sources"]]
    held_out = held_out_sequences(files, length, sequences)
    texts: Sequences = [ids.tolist() for source in held_out.values() for ids in source]
    content |= {"sequences": sequences, "length": length, "machine": machine(), "versions": versions()}
    runtimes: dict[str, Runtime] = {}
    for name in CHECKPOINTS:
        if not (root / name / "model.safetensors").is_file():
            print(f"{name}: no weights, left out")
            continue
        package = root.parent / "packages" / name.replace("/", "-")
        if not package.is_dir():
            package.parent.mkdir(parents=True, exist_ok=True)
            with building(root / name, package, ExportOptions(chunk=max(CHUNKS))):
                pass
        runtimes[name] = Runtime.load(package)
    for setting, wanted in settings_of(4).items():
        for name, runtime in runtimes.items():
            found = content["measured"].setdefault(name, {})
            if setting not in found and not (name.endswith("phase1") and setting[0].isdigit()):
                found[setting] = one(runtime, texts, wanted, own=128)
                content["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
                write_text(output, json.dumps(content, indent=1) + "\n")
                print(name, setting, found[setting], flush=True)


if __name__ == "__main__":
    typer.run(main)
