"""One process of text_train.py: trains stages until a time each, and measures what it trained.

    python benchmarks/experiments/text_job.py PLAN JOB

The number of steps of a stage is not known before: the schedules of the learning rate and of alpha follow the share of
the stage's time that has passed. The rows of an ablation are trained in turns, on the same batches, so that each takes
as many steps as the others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from melt_models.atomic import write_text
from melt_models.checkpoint import load_model
from melt_models.training.config import RunConfig, Stage, read_run
from melt_models.training.data import Batches
from melt_models.training.errors import TrainingDivergedError
from melt_models.training.objectives import Objective
from melt_models.training.snapshots import Trained
from melt_models.training.stages import _batches, _Start
from melt_models.training.trainer import _Loop, make_accelerator, make_optimizers
from text_measure import LOOPS, held_out_sequences, measure
from text_runs import SIZES
from torch import Tensor
from transformers.utils import logging

_KEEP = 20.0  # seconds between copies of the weights, to which a diverged stage falls back
_FIRST = 1_000_000  # steps, as long as none has been timed


@dataclass
class Training:
    """A stage of one run under way."""

    config: RunConfig
    stage: Stage
    start: _Start
    objective: Objective
    trained: Trained
    loop: _Loop
    kept: dict[str, Tensor]
    diverged: str | None = None

    @classmethod
    def begin(cls, config: RunConfig, name: str, batches: Batches, accelerator: Accelerator) -> Training:
        stage: Stage = getattr(config, name)
        start = _Start.of(config, name, batches)
        torch.manual_seed(stage.training.seed)
        objective = start.objective(stage)
        prepared, *optimizers = accelerator.prepare(objective, *make_optimizers(objective, stage.training))
        objective.train()
        trained = Trained(prepared, optimizers, accelerator)
        made = cls(config, stage, start, objective, trained, _Loop(objective, trained, stage.training), {})
        made.keep()
        return made

    def keep(self) -> None:
        """Keep a copy of the weights."""
        self.kept = {name: value.detach().clone() for name, value in self.trained.model_state().items()}

    def step(self, step: int, steps: int, batch: Any) -> dict[str, float]:
        """Run one step of about ``steps``; halve the micro-batch as often as memory is too small."""
        while True:
            self.loop.config = dataclasses.replace(self.loop.config, steps=steps)
            try:
                return self.loop.step(step, batch.input_ids, batch.targets)
            except torch.OutOfMemoryError:
                micro = (self.loop.config.micro_batch or len(batch.input_ids)) // 2
                if not micro:
                    raise
                print(f"out of memory: micro_batch is {micro} from here on", flush=True)
                self.loop.config = dataclasses.replace(self.loop.config, micro_batch=micro)
                torch.cuda.empty_cache()

    def finish(self, name: str, batches: Batches) -> Path:
        """Write the checkpoint in bf16."""
        state = self.kept if self.diverged else self.trained.model_state()
        output = self.config.output / name
        self.start.write({key: value.to(torch.bfloat16) for key, value in state.items()}, batches, output)
        return output


class Job:
    """A process: one run, or the rows of an ablation, through their stages."""

    def __init__(self, plan: dict[str, Any], name: str):
        self.plan, self.name, self.job = plan, name, plan["jobs"][name]
        self.size = SIZES[plan["size"]]
        self.begun: float = plan["begun"]
        self.configs = {row: self._config(row, content) for row, content in self.job["rows"].items()}
        self.accelerator = make_accelerator()
        self.results: dict[str, Any] = {row: {"stages": {}} for row in self.configs}
        first = next(iter(self.configs.values()))
        self.held_out = held_out_sequences(first.data["held_out"], self.size.sequence, plan["held_out"])

    def run(self) -> None:
        """Train every stage and measure it."""
        for stage, share in self.job["stages"].items():
            deadline = self.begun + share * self.plan["budget"]
            self.train(stage, deadline)
        for stage in self.job["stages"]:
            if stage != "gate":  # changes no logits
                self.measure(stage)

    def train(self, name: str, deadline: float) -> None:
        """Train a stage of all rows until the deadline, in turns."""
        self.accelerator = make_accelerator(self.plan["precisions"][name])
        configs = {row: config for row, config in self.configs.items() if not self._same_as_first(row, name)}
        first = next(iter(configs.values()))
        batches = _batches(first, name, getattr(first, name).training.seed)
        rows = {row: Training.begin(config, name, batches, self.accelerator) for row, config in configs.items()}
        files = {row: self._open(config.output / "metrics" / f"{name}.jsonl") for row, config in configs.items()}
        begun = kept = time.time()
        step, tokens = 0, 0
        while (now := time.time()) < deadline or step < 2:
            done = (now - begun) / max(deadline - begun, 1e-9)
            steps = max(step + 1, round(step / min(done, 1.0))) if step and done > 0 else _FIRST
            batch = batches.take(first_batch(rows), min(done, 1.0))
            tokens += batch.input_ids.numel()
            for row, training in rows.items():
                if training.diverged:
                    continue
                try:
                    figures = training.step(step, steps, batch)
                except TrainingDivergedError as error:
                    training.diverged = str(error)
                    print(f"{row}: {error}", flush=True)
                    continue
                line = {"step": step + 1, "of": steps, **figures, "tokens": tokens, "seconds": time.time() - begun}
                print(json.dumps(_short(line)), file=files[row], flush=True)
            step += 1
            if now - kept > _KEEP:
                kept = now
                for training in rows.values():
                    if not training.diverged:
                        training.keep()
        for row, training in rows.items():
            path = training.finish(name, batches)
            gate = training.objective.model.model.early_exit_gate
            values = {"weight": gate.weight.tolist(), "bias": gate.bias.tolist()}
            write_text(path / "early_exit_gate.json", json.dumps(values))  # the stage gate replaces it
            self.results[row]["stages"][name] = {
                "steps": step,
                "tokens": tokens,
                "seconds": round(time.time() - begun, 1),
                "diverged": training.diverged,
                "last": _last(files[row].name),
            }
            files[row].close()
        for row, config in self.configs.items():
            if row not in rows:
                first_row = next(iter(self.configs))
                (config.output / name).symlink_to((self.configs[first_row].output / name).absolute())
                self.results[row]["stages"][name] = dict(self.results[first_row]["stages"][name], shared=first_row)
        print(f"{self.name}: {name}: {step} steps, {tokens:,} tokens in {time.time() - begun:.0f} s", flush=True)
        self.accelerator.free_memory()

    def measure(self, name: str) -> None:
        """Measure a stage's checkpoint of every row and write the results so far."""
        for row, config in self.configs.items():
            if "shared" in self.results[row]["stages"][name]:
                continue
            begun = time.time()
            model = load_model(config.output / name, dtype=torch.float32).eval().to(self.accelerator.device)
            trained, main = model.config.total_ut_steps, len(self.configs) == 1
            last = name == "phase2"
            sizes = (1, *self.size.chunks, 2 * self.size.chunks[-1])
            depths = LOOPS if main else range(1, trained + 1) if last else (trained,)
            chunks = sizes if main and last else sizes[:1] if last else ()
            decoded = self.size.sequence // 2 if main and last else 0
            figures = measure(model, self.held_out, depths, chunks, self.plan["eval_batch"], decoded=decoded)
            figures["measuring_seconds"] = round(time.time() - begun, 1)
            self.results[row]["stages"][name] |= figures
            at_all = figures["loops"][str(model.config.total_ut_steps)]["all"]
            print(f"{row}: {name}: perplexity {at_all} ({figures['measuring_seconds']} s)", flush=True)
            self._write(row)

    def _write(self, row: str) -> None:
        config = self.configs[row]
        parameters = sum(
            x.numel() for x in load_model(next(iter(self._checkpoints(config))), dtype=torch.float32).parameters()
        )
        about = {
            "name": config.output.name,
            "row": row.rpartition("-")[0],
            "seed": config.seed,
            "parameters": parameters,
            "content": self.job["rows"][row],
            "held_out_sequences": {name: len(sequences) for name, sequences in self.held_out.items()},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {"torch": torch.__version__},
        }
        write_text(config.output / "result.json", json.dumps({**about, **self.results[row]}))

    def _checkpoints(self, config: RunConfig) -> Sequence[Path]:
        return [config.output / stage for stage in self.job["stages"] if (config.output / stage).exists()]

    def _same_as_first(self, row: str, name: str) -> bool:
        """Return whether a row's stage would only repeat that of the first row."""
        contents, first = self.job["rows"], next(iter(self.job["rows"]))
        if row == first:
            return False
        stages = list(self.job["stages"])
        before = ["melt", *stages[: stages.index(name) + 1]]
        return all(contents[row].get(part) == contents[first].get(part) for part in before)

    def _config(self, row: str, content: dict[str, Any]) -> RunConfig:
        file = Path(content["output"]) / "run.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False))
        return read_run(file)

    @staticmethod
    def _open(path: Path) -> Any:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")


def first_batch(rows: dict[str, Training]) -> int:
    return next(iter(rows.values())).stage.training.batch_size


def _short(values: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}


def _last(file: str) -> dict[str, Any]:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1]) if lines else {}


def main() -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    Job(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[2]).run()


if __name__ == "__main__":
    main()
