"""Trains a looped model on text within a number of seconds: teachers, MELTs and ablations side by side on one device.

    python benchmarks/experiments/text_train.py --size gpu --budget 480 --out DIR

Reads the data that text_data.py packed. Every job is a process of its own (text_job.py), all on the same device: one
run of a small model leaves a GPU idle between its small operations. Each stage ends at its share of the time, whatever the
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
from pathlib import Path
from typing import Annotated, Any

import typer
from text_runs import MAIN, ROWS, SEEDS, SIZES, content

HERE = Path(__file__).resolve().parent
# Shares of the time at which stages end.
MAIN_ENDS = {"teacher": 0.36, "phase1": 0.52, "phase2": 0.83, "gate": 0.86}
ROW_ENDS = {"phase1": 0.60, "phase2": 0.85}
KEPT = (
    "main-0/gate",
    "main-0/teacher",
    "main-1/gate",
    "main-1/teacher",
    "main-0/phase1",
    "gate-0/phase2",
    "main-1/phase1",
)
_TURN = 2.0  # seconds
_RENEW = 45.0
_GRACE = 25.0  # seconds after the budget, before jobs are ended


def plan_of(size: str, budget: float, data: Path, root: Path, ablations: bool, held_out: int) -> dict[str, Any]:
    """Return the jobs of a run: rows, stages with the share of the time at which each ends, what each waits for."""
    sizes = SIZES[size]
    jobs: dict[str, Any] = {
        f"{MAIN.name}-{seed}": {
            "rows": {f"{MAIN.name}-{seed}": content(MAIN, seed, sizes, data, root)},
            "stages": MAIN_ENDS,
        }
        for seed in SEEDS
    }
    if ablations:
        seed = SEEDS[0]
        first = f"{MAIN.name}-{seed}"
        teacher = root / first / "teacher"
        rows = {f"{row.name}-{seed}": content(row, seed, sizes, data, root, teacher=teacher) for row in ROWS}
        jobs["ablations"] = {"rows": rows, "stages": ROW_ENDS, "needs": str(teacher), "after": first}
    return {
        "size": size,
        "budget": budget,
        "begun": time.time(),
        "held_out": held_out,
        "eval_batch": 160 if size == "gpu" else 16,
        "jobs": jobs,
    }


def pack(root: Path, out: Path, most: int) -> None:
    """Copy figures and logs, and those of the weights of KEPT that there are and that fit, into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.results.partial")
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix in (".json", ".jsonl", ".txt", ".yaml") and path.name != "tokenizer.json":
                tar.add(path, path.relative_to(root))
    os.replace(partial, out / "results.tar.gz")
    free = most - (out / "results.tar.gz").stat().st_size
    for name in KEPT:
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
    ablations: Annotated[bool, typer.Option(help="Train the ablations too.")] = True,
    held_out: Annotated[int, typer.Option(help="Held-out sequences per source.")] = 48,
    threads: Annotated[int, typer.Option(help="CPU threads of each process.")] = 3,
) -> None:
    """Train, measure and collect, within the budget."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for stale in out.glob("*.safetensors") if out is not None else ():
        stale.unlink()
    plan = plan_of(size, budget, data, root, ablations, held_out)
    (root / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    jobs: dict[str, subprocess.Popen[bytes]] = {}
    for name in plan["jobs"]:
        with (root / f"{name}.txt").open("wb") as log:
            command = [sys.executable, str(HERE / "text_job.py"), str(root / "plan.json"), name]
            jobs[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    renewed = time.time()
    failed = False
    while any(job.poll() is None for job in jobs.values()):
        time.sleep(_TURN)
        if out is not None and time.time() - renewed > _RENEW:
            renewed = time.time()
            pack(root, out, most_bytes)
        before = {job.get("after") for job in plan["jobs"].values()}
        needed = [name for name, job in jobs.items() if job.poll() and name in before]
        if needed or time.time() > plan["begun"] + budget + _GRACE:
            print(f"{needed[0]} failed" if needed else "the time is over", "; unfinished jobs are ended", flush=True)
            for job in jobs.values():
                job.terminate()
            break
    for name, job in jobs.items():
        failed |= job.wait() != 0
        print(
            f"== {name}: exit {job.returncode}\n{(root / f'{name}.txt').read_text(errors='replace')[-2500:]}",
            flush=True,
        )
    if out is not None:
        pack(root, out, most_bytes)
        print("\n".join(f"{path.stat().st_size:>10} {path.name}" for path in sorted(out.iterdir())), flush=True)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
