"""Trains looped models on text within a number of seconds: a teacher and its MELT per seed, then ablations.

    python benchmarks/experiments/text_train.py --size gpu --budget 430 --out DIR
    python benchmarks/experiments/text_train.py --size gpu --budget 200 --out DIR --jobs ablations

Reads the data that text_data.py packed. Every seed is a process of its own (text_job.py), all on one device: one run of
a small model leaves a GPU idle between its small operations. Each stage ends at its share of the time, whatever the
device's speed, with its schedule finished, and writes a checkpoint in bf16. ``--out`` receives results.tar.gz (figures,
metrics, logs; renewed as the run goes on) and the weights in the order of KEPT while they fit ``--most-bytes``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from text_runs import MAIN, ROWS, SEEDS, SIZES, content

HERE = Path(__file__).resolve().parent
# Shares of the time at which stages end; what remains is for measuring.
ENDS = {
    "main": {"teacher": 0.42, "phase1": 0.58, "phase2": 0.86, "gate": 0.88},
    "ablations": {"phase1": 0.36, "phase2": 0.8},
}
# Weights to bring back, the most useful first.
KEPT = {
    "main": ("main-0/gate", "main-0/teacher", "main-1/gate", "main-1/teacher"),
    "ablations": ("main-0/phase1", "main-1/phase1", "gate-0/phase2", "last-0/phase2"),
}
# A teacher's large batches profit from bf16; a student's many small operations would be joined by as many conversions.
PRECISIONS = {"teacher": "bf16", "phase1": "tf32", "phase2": "tf32", "gate": "tf32"}
_TURN = 2.0  # seconds
_RENEW = 45.0


def plan_of(size: str, budget: float, data: Path, root: Path, jobs: str, held_out: int) -> dict[str, Any]:
    """Return the processes of a call: their rows, and the share of the time at which each stage ends."""
    sizes, made = SIZES[size], {}
    for seed in SEEDS:
        if jobs == "main":
            rows = {f"{MAIN.name}-{seed}": content(MAIN, seed, sizes, data, root)}
        else:
            teacher = root / f"{MAIN.name}-{seed}" / "teacher"
            rows = {f"{row.name}-{seed}": content(row, seed, sizes, data, root, teacher=teacher) for row in ROWS}
        made[f"{jobs}-{seed}"] = {"rows": rows, "stages": ENDS[jobs]}
    return {
        "size": size,
        "budget": budget,
        "begun": time.time(),
        "held_out": held_out,
        "eval_batch": 160 if size == "gpu" else 16,
        "precisions": PRECISIONS,
        "jobs": made,
    }


def pack(root: Path, out: Path, most: int, kept: Sequence[str]) -> None:
    """Copy figures and logs, and those of the weights of ``kept`` that there are and that fit, into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.results.partial")
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix in (".json", ".jsonl", ".txt", ".yaml") and path.name != "tokenizer.json":
                tar.add(path, path.relative_to(root))
    os.replace(partial, out / "results.tar.gz")
    free = most - (out / "results.tar.gz").stat().st_size
    for name in kept:
        source, target = root / name / "model.safetensors", out / f"{name.replace('/', '-')}.safetensors"
        if source.is_file() and not target.exists() and source.stat().st_size <= free:
            shutil.copyfile(source, partial)
            os.replace(partial, target)
        free -= target.stat().st_size if target.exists() else 0


def main(
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "cpu",
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = 3600,
    data: Annotated[Path, typer.Option(help="Folder that text_data.py wrote.")] = Path("build/text/data"),
    root: Annotated[Path, typer.Option(help="Where the runs are written.")] = Path("build/text/runs"),
    out: Annotated[Path | None, typer.Option(help="Where figures and weights are copied.")] = None,
    most_bytes: Annotated[int, typer.Option(help="Bytes for `--out`.")] = 66_000_000,
    jobs: Annotated[str, typer.Option(help="main, or after it ablations.")] = "main",
    held_out: Annotated[int, typer.Option(help="Held-out sequences per source.")] = 48,
    threads: Annotated[int, typer.Option(help="CPU threads of each process.")] = 3,
    grace: Annotated[float, typer.Option(help="Seconds after the budget, before processes are ended.")] = 25,
) -> None:
    """Train, measure and collect, within the budget."""
    if jobs not in ENDS or size not in SIZES:
        raise typer.BadParameter(f"jobs are {', '.join(ENDS)}; sizes are {', '.join(SIZES)}")
    plan = plan_of(size, budget, data, root, jobs, held_out)
    for job in plan["jobs"].values():
        for row in job["rows"]:
            shutil.rmtree(root / row, ignore_errors=True)
    for stale in out.glob("*.safetensors") if out is not None else ():
        stale.unlink()
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{jobs}.json").write_text(json.dumps(plan), encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    running: dict[str, subprocess.Popen[bytes]] = {}
    for name in plan["jobs"]:
        with (root / f"{name}.txt").open("wb") as log:
            command = [sys.executable, str(HERE / "text_job.py"), str(root / f"{jobs}.json"), name]
            running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    renewed = time.time()
    while any(job.poll() is None for job in running.values()):
        time.sleep(_TURN)
        if out is not None and time.time() - renewed > _RENEW:
            renewed = time.time()
            pack(root, out, most_bytes, KEPT[jobs])
        broken = [name for name, job in running.items() if job.poll()]
        if broken or time.time() > plan["begun"] + budget + grace:
            print(f"{broken[0]} failed" if broken else "the time is over; unfinished jobs are ended", flush=True)
            for job in running.values():
                job.terminate()
            break
    codes = [job.wait() for job in running.values()]
    failed = any(code != 0 for code in codes)
    for name, job in running.items():
        log_end = (root / f"{name}.txt").read_text(errors="replace")[-3000:]
        print(f"== {name}: exit {job.returncode}\n{log_end}", flush=True)
    if out is not None:
        pack(root, out, most_bytes, KEPT[jobs])
        print("\n".join(f"{path.stat().st_size:>10} {path.name}" for path in sorted(out.iterdir())), flush=True)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
