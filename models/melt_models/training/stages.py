"""The stages of a run in order: a LoopLM teacher, phase 1, phase 2, the exit gate. Each writes an ordinary checkpoint
directory."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import GenerationConfig

from ..atomic import new_directory, write_text
from ..checkpoint import Weights, check_looped, load_model, meta_model, open_weights, read_config
from ..configuration import LoopLMConfig, MeltConfig
from ..convert import COMPANIONS, melt_config, melt_state, save_state
from ..errors import CheckpointError
from ..looplm import LoopLMForCausalLM
from ..melt import MeltForCausalLM
from .chunk_advice import chunk_warnings
from .config import FREE_TO_CHANGE, RunConfig, Stage
from .data import Batches, make_batches
from .errors import ConfigError, SnapshotError
from .gate import GateObjective, GateOptions
from .held_out import HeldOut
from .objectives import DistillObjective, Objective, TeacherObjective, TeacherOptions
from .report import print_evaluations
from .snapshots import Snapshots
from .trainer import make_accelerator, train

RUN_FILE = "run.yaml"  # in the output: the run's file as it was when a stage ended
# Numbers of the data streams, which must never change: a run could no longer be repeated.
_STREAMS = ("teacher", "phase1", "phase2")
_GATE = 1 << 40


def run(config: RunConfig, stages: Sequence[str], *, resume: bool = False) -> None:
    """Train the named stages. With ``resume`` finished stages are skipped and an unfinished one resumes.

    Raises ConfigError, CheckpointError, SnapshotError, TrainingDivergedError, OSError.
    """
    missing = [name for name in stages if name not in config.stages()]
    if missing:
        raise ConfigError(
            f"{config.file} has no section {missing[0]} with steps to train; it has {', '.join(config.stages())}"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator(config.precision)
    with _deterministic(accelerator.device.type == "cpu"):
        for name in stages:
            _run_stage(config, name, accelerator, resume=resume)


def _run_stage(config: RunConfig, name: str, accelerator: Accelerator, *, resume: bool) -> None:
    stage: Stage = getattr(config, name)
    output, state = config.output / name, config.output / "state" / name
    finished = output.exists()
    if finished and not resume:
        raise SnapshotError(f"{output} exists already; pass --resume to skip it, or choose another output")
    batches = _batches(config, name, stage.training.seed)
    start = _Start.of(config, name, batches)
    settings = start.settings(config, stage)
    if finished:
        Snapshots(state, settings, accelerator).open(resume=True)
        return
    held_out, reason = _held_out(config, stage)
    warnings = chunk_warnings(stage.options, start.config, batches.sequence_length)
    if held_out is None or accelerator.distributed_type == DistributedType.FSDP:
        reason = reason or "FSDP shards the weights; use melt-train eval"
        warnings.append(f"the model is not evaluated during training: {reason}")
    for sentence in warnings if accelerator.is_main_process else ():
        print(f"melt-train: {name}: {sentence}", file=sys.stderr)
    torch.manual_seed(stage.training.seed)
    objective = start.objective(stage)
    weights, evaluation = train(
        objective,
        batches,
        stage.training,
        accelerator=accelerator,
        stage=name,
        state=state,
        metrics=config.output / "metrics",
        settings=settings,
        held_out=held_out,
        resume=resume,
    )
    if accelerator.is_main_process:
        start.write(weights, batches, output)
        _keep(config)
    accelerator.wait_for_everyone()
    Snapshots(state, settings, accelerator).clear()
    if evaluation is None or held_out is None:
        return
    models = {name: evaluation}
    if isinstance(objective, DistillObjective):
        depths = [depth.loops for depth in evaluation.depths]
        teacher: Any = objective.teacher.to(accelerator.device)  # type: ignore[arg-type]
        models["teacher"] = held_out.evaluate(teacher, depths, accelerator=accelerator)
    if accelerator.is_main_process:
        print_evaluations(models, sys.stderr)


def _held_out(config: RunConfig, stage: Stage) -> tuple[HeldOut | None, str]:
    """Return what a stage is evaluated on, or None and the reason if there is nothing. Raises ConfigError if the file
    asks for evaluations."""
    training = stage.training
    try:
        return HeldOut.draw(config.data, training.eval_sequences, training.eval_problems), ""
    except (ValueError, TypeError) as error:
        if training.eval_every:
            raise ConfigError(f"{config.file}: section data: eval_every is set, but {error}") from error
        return None, str(error)


def _keep(config: RunConfig) -> None:
    """Keep the run's file in its output, for later evaluations."""
    kept = config.output / RUN_FILE
    if not (kept.exists() and kept.samefile(config.file)):
        write_text(kept, config.file.read_text(encoding="utf-8"))


def _batches(config: RunConfig, name: str, seed: int) -> Batches:
    """Return a stage's data. No two stages see the same sequences in the same order."""
    number = _GATE + seed if name == "gate" else seed * len(_STREAMS) + _STREAMS.index(name)
    try:
        return make_batches(config.data, number)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{config.file}: section data: {error}") from error


@dataclass(frozen=True)
class _Start:
    """Start of a stage: the configuration of its model, and the directories of weights that it reads, if any."""

    config: LoopLMConfig | MeltConfig
    embedding_std: float | None = None
    branch_scale: float | None = None
    source: Path | None = None
    teacher: Path | None = None

    @classmethod
    def of(cls, run: RunConfig, name: str, batches: Batches) -> _Start:
        """Find out where a stage starts. Raises ConfigError, CheckpointError."""
        if name == "teacher":
            ids = {"pad_token_id": batches.pad_token_id, "eos_token_id": batches.eos_token_id}
            fields = {"vocab_size": batches.vocab_size, **ids, **run.model}
            start = cls(LoopLMConfig(**fields), run.embedding_std, run.branch_scale)
        elif name == "gate":
            start = cls._of_gate(run)
        else:
            start = cls._of_phase(run, name)
        if start.config.vocab_size < batches.vocab_size:
            raise ConfigError(
                f"{run.file}: section data has {batches.vocab_size} tokens, "
                f"the model of {name} only {start.config.vocab_size}"
            )
        return start

    @classmethod
    def _of_phase(cls, run: RunConfig, name: str) -> _Start:
        trained = isinstance(run.teacher, Stage)
        teacher = run.output / "teacher" if isinstance(run.teacher, Stage) else cast(Path, run.teacher)
        if trained and not teacher.exists():
            raise ConfigError(f"{name} needs the teacher in {teacher}, which is not there; run the stage teacher first")
        looplm = read_config(teacher)
        if not isinstance(looplm, LoopLMConfig):
            raise CheckpointError(
                f"{teacher} is a {looplm.model_type!r}; a teacher must be a LoopLM, with caches in every loop"
            )
        named = getattr(run, name).checkpoint
        if named is None and (name == "phase1" or "phase1" not in run.stages()):
            return cls(melt_config(looplm, **run.melt), source=teacher, teacher=teacher)
        source = run.output / "phase1" if named is None else named
        if not source.exists():
            raise ConfigError(f"phase2 starts from {source}, which is not there; run the stage phase1 first")
        melt = cast(MeltConfig, read_config(source))
        if not isinstance(melt, MeltConfig):
            raise CheckpointError(f"{source} is a {melt.model_type!r}; phase2 goes on with a MELT")
        _check_distilled(looplm, melt, source, teacher)
        _check_melt(run, melt, source)
        return cls(melt, source=source, teacher=teacher)

    @classmethod
    def _of_gate(cls, run: RunConfig) -> _Start:
        """Return the finished model whose exit gate is trained: the one named, or that of the stage before."""
        assert run.gate is not None
        trained = [name for name in run.stages() if name != "gate"]
        source = run.gate.checkpoint
        if source is None:
            source = run.output / trained[-1] if trained else cast(Path, run.teacher)
            if not source.exists():
                raise ConfigError(f"gate starts from {source}, which is not there; run the stage {trained[-1]} first")
        config = read_config(source)
        check_looped(config)
        if isinstance(config, MeltConfig):
            _check_melt(run, config, source)
        return cls(cast("LoopLMConfig | MeltConfig", config), source=source)

    def settings(self, run: RunConfig, stage: Stage) -> dict[str, Any]:
        """Return everything that the stage's result depends on, as a flat mapping."""
        told = {**dataclasses.asdict(stage.training), **dataclasses.asdict(stage.options)}
        model = self.config.to_dict()
        model = {f"model.{key}": value for key, value in model.items() if key not in ("transformers_version", "dtype")}
        weights = {
            f"{what} weights": _digest(path)
            for what, path in (("starting", self.source), ("teacher's", self.teacher))
            if path is not None
        }
        initial = {"embedding_std": self.embedding_std, "branch_scale": self.branch_scale}
        values = {"precision": run.precision, "data": run.data} | initial | model | weights
        return values | {key: value for key, value in told.items() if key not in FREE_TO_CHANGE}

    def objective(self, stage: Stage) -> Objective:
        """Build the objective in float32: a new LoopLM, or a MELT with its frozen teacher."""
        if isinstance(stage.options, TeacherOptions):
            model = LoopLMForCausalLM(cast(LoopLMConfig, self.config))
            if self.embedding_std is not None:
                torch.nn.init.normal_(model.model.embed_tokens.weight, std=self.embedding_std)
            if self.branch_scale is not None:
                _scale_branches(model, self.branch_scale)
            return TeacherObjective(model.train(), stage.options)
        assert self.source is not None
        if isinstance(stage.options, GateOptions):
            return GateObjective(self._model().train(), stage.options, stage.training.seed)
        assert self.teacher is not None
        teacher = load_model(self.teacher, dtype=torch.float32)
        return DistillObjective(
            cast(MeltForCausalLM, self._model().train()),
            cast(LoopLMForCausalLM, teacher),
            stage.options,
            stage.training.seed,
        )

    def _model(self) -> Any:
        """Load the model that the stage begins with, in float32."""
        assert self.source is not None
        found = read_config(self.source)
        if found.model_type == self.config.model_type:
            state: dict[str, Tensor] = dict(load_model(self.source, dtype=torch.float32).state_dict())
        else:
            state = melt_state(cast(MeltConfig, self.config), open_weights(self.source, found))
        model = meta_model(self.config)
        # Copied, because weights may be mapped from a file, and because training must not change the teacher's.
        state = {key: value.float().clone() for key, value in state.items()}
        if self.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, strict=True, assign=True)
        model.tie_weights()
        return model

    def write(self, weights: dict[str, Tensor], batches: Batches, output: Path) -> None:
        """Write the trained checkpoint as an ordinary directory."""
        config: Any = self.config
        if isinstance(config, MeltConfig):
            trained = "early_exit_gate" if output.name == "gate" else "latent_gate"
            config.untrained = [part for part in config.untrained if part != trained]
        weights = {name: value.detach().cpu() for name, value in weights.items()}
        with new_directory(output) as build:
            save_state(config, weights, build)
            # transformers writes no negative id, with which some configurations say that there is none.
            pad = config.pad_token_id if config.pad_token_id is None or config.pad_token_id >= 0 else None
            ids = {"eos_token_id": config.eos_token_id, "pad_token_id": pad}
            GenerationConfig(do_sample=False, **ids).save_pretrained(build)
            batches.save_tokenizer(build)
            origin = self.teacher or self.source
            for name in COMPANIONS:
                if origin is not None and (origin / name).is_file() and not (build / name).exists():
                    shutil.copyfile(origin / name, build / name)


def _scale_branches(model: LoopLMForCausalLM, scale: float) -> None:
    """Set the weights of the norms after attention and MLP. Raises ConfigError if the model's layout has none."""
    if model.config.norm_layout != "sandwich":
        raise ConfigError(f"branch_scale needs norm_layout: sandwich, not {model.config.norm_layout}")
    layers: Any = model.model.layers
    for layer in layers:
        for norm in (layer.input_layernorm_2, layer.post_attention_layernorm_2):
            torch.nn.init.constant_(norm.weight, scale)


def _check_distilled(looplm: LoopLMConfig, melt: MeltConfig, source: Path, teacher: Path) -> None:
    """Raise CheckpointError if a MELT cannot learn from a LoopLM, state by state."""
    for key in ("vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim", "total_ut_steps"):
        mine, theirs = getattr(melt, key), getattr(looplm, key)
        if mine != theirs:
            raise CheckpointError(f"{source} has {key} {mine} and its teacher {teacher} {theirs}; they must be equal")


def _check_melt(run: RunConfig, melt: MeltConfig, source: Path) -> None:
    """Raise ConfigError if the section melt asks for another model than ``source`` holds."""
    for key, value in run.melt.items():
        if getattr(melt, key) != value:
            raise ConfigError(f"{run.file}: section melt: {key} is {value!r}, but {source} has {getattr(melt, key)!r}")


def _digest(directory: Path) -> str:
    """Return a hash of a checkpoint's tensors."""
    whole = hashlib.sha256()
    for path in sorted({stored.file for stored in Weights(directory).values()}):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Make PyTorch add in the same order in every run, where ``wanted``."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
