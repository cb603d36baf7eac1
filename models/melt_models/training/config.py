"""Reading of a run's YAML file into frozen dataclasses. Errors name the file, the section and the key."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from melt_hub import CHECKPOINT, local_directory

from ..checkpoint import CONFIG_ERRORS, innermost
from ..configuration import LoopedConfig, LoopLMConfig, MeltConfig
from .errors import ConfigError
from .gate import GateOptions
from .objectives import PHASE1, PHASE2, DistillOptions, TeacherOptions
from .sections import STAGES, check_keys, read_sections

PRECISIONS = ("fp32", "tf32", "bf16")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine", "flat-cosine")
# Fields that do not change what is computed, so that a resumed run may change them.
FREE_TO_CHANGE = ("micro_batch", "save_every", "log_every", "eval_every", "eval_sequences", "eval_problems")
_LARGEST_RATE = 1e30  # optimisers compute multiples of the rate as float32
T = TypeVar("T")


@dataclass(frozen=True)
class StageConfig:
    """Hyperparameters of a stage.

    - ``batch_size``: sequences per optimiser step, over all devices; ``micro_batch``: sequences at once on one device
      (None: all).
    - ``learning_rate``; ``gate_learning_rate``: for the latent gates (None: the same). Under ``optimizer: muon`` the
      layers' matrices have ``matrix_learning_rate``, and so have the gates' matrices unless they have their own.
    - ``schedule`` after ``warmup_steps``: "constant", "cosine" down to the share ``final_rate``, or "flat-cosine":
      constant in the first half of the steps, cosine in the second.
    - ``clip``: largest norm of the gradient. ``save_every``, ``log_every``: in steps.
    - ``eval_every``: steps between evaluations on held-out data (0: only after the last step), on ``eval_sequences``
      sequences, and of a task also on ``eval_problems`` problems.
    """

    steps: int
    batch_size: int = 32
    micro_batch: int | None = None
    learning_rate: float = 1e-3
    gate_learning_rate: float | None = None
    optimizer: str = "adamw"
    matrix_learning_rate: float = 0.02
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 50
    schedule: str = "cosine"
    final_rate: float = 0.02
    clip: float = 1.0
    save_every: int = 200
    log_every: int = 1
    eval_every: int = 0
    eval_sequences: int = 64
    eval_problems: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch", "save_every", "log_every", "eval_sequences", "eval_problems"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("steps", "warmup_steps", "eval_every", "seed", "weight_decay", "final_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("learning_rate", "gate_learning_rate", "matrix_learning_rate", "clip"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("learning_rate", "gate_learning_rate", "matrix_learning_rate"):
            if (getattr(self, name) or 0) > _LARGEST_RATE:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be at most {_LARGEST_RATE:g}")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}; each must be at least 0 and below 1")
        if self.final_rate > 1:
            raise ValueError(f"final_rate is {self.final_rate}; it is a share and must be at most 1")


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its hyperparameters and the options of its objective.

    ``checkpoint``: the MELT that phase 2 goes on with, or the model whose exit gate is trained; None: the run's own, of
    the stage before.
    """

    training: StageConfig
    options: TeacherOptions | DistillOptions | GateOptions
    checkpoint: Path | None = None


@dataclass(frozen=True)
class RunConfig:
    """A run: its file, its data and its stages.

    ``model`` holds fields of LoopLMConfig for a new teacher, ``embedding_std`` the standard deviation of its initial
    embeddings, ``branch_scale`` the initial weights of the norms after attention and MLP, of sandwich norms: below 1
    more of the token's embedding is left after several loops. ``melt`` holds the fields of MeltConfig that a student
    does not take from its teacher. ``teacher`` is a stage, or the directory of an existing LoopLM; None if only the
    gate of an existing checkpoint is trained.
    """

    file: Path
    output: Path
    data: dict[str, Any]
    seed: int = 0
    precision: str = "fp32"
    threads: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    embedding_std: float | None = None
    branch_scale: float | None = None
    melt: dict[str, Any] = field(default_factory=dict)
    teacher: Stage | Path | None = None
    phase1: Stage | None = None
    phase2: Stage | None = None
    gate: Stage | None = None

    def stages(self) -> list[str]:
        """Return the names of the stages that this run trains, in order."""
        made = {name: getattr(self, name) for name in STAGES}
        return [name for name, stage in made.items() if isinstance(stage, Stage) and stage.training.steps]


# Defaults of the sections. The phases' learning rates are those of arXiv 2605.07721.
_PHASE_RATES = {"learning_rate": 8e-6, "gate_learning_rate": 5e-4}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "teacher": dataclasses.asdict(TeacherOptions()),
    "phase1": _PHASE_RATES | dataclasses.asdict(PHASE1),
    "phase2": _PHASE_RATES | dataclasses.asdict(PHASE2),
    "gate": dataclasses.asdict(GateOptions()),
}
_OPTIONS: dict[str, type[TeacherOptions | DistillOptions | GateOptions]] = {
    "teacher": TeacherOptions,
    "phase1": DistillOptions,
    "phase2": DistillOptions,
    "gate": GateOptions,
}
_INITIAL = ("embedding_std", "branch_scale")  # beside the fields of LoopLMConfig
_MODEL_FIELDS = {*LoopedConfig.__annotations__, *LoopLMConfig.__annotations__, "rope_theta", *_INITIAL} - {
    "keys_to_ignore_at_inference",
    "model_type",
    "default_theta",
}
_MELT_FIELDS = set(MeltConfig.__annotations__) - {"model_type", "untrained"}


def read_run(file: Path, *, output: Path | None = None) -> RunConfig:
    """Read a run from a YAML file; ``output`` replaces the file's own. Raises ConfigError."""
    content = read_sections(file)
    _check_sections(content, file)
    top: dict[str, Any] = {
        name: content[name] for name in ("output", "seed", "precision", "threads") if name in content
    }
    top = _fields(RunConfig, top, f"{file}")
    if output is not None:
        top["output"] = output
    if "output" not in top:
        raise ConfigError(f"{file}: output is missing; it names the directory that the run writes")
    if top.get("precision", "fp32") not in PRECISIONS:
        raise ConfigError(f"{file}: precision is {top['precision']!r}; it must be one of {', '.join(PRECISIONS)}")
    threads = top.get("threads")
    if (threads is not None and threads < 1) or top.get("seed", 0) < 0:
        raise ConfigError(f"{file}: threads must be 1 or more and seed 0 or more")
    model = {key: _plain(value) for key, value in content.get("model", {}).items()}
    check_keys(model, _MODEL_FIELDS, f"{file}: section model")
    for name in _INITIAL:
        value = model.pop(name, None)
        top[name] = None if value is None else _convert(value, float, f"{file}: section model: {name}")
        if value is not None and top[name] <= 0:
            raise ConfigError(f"{file}: section model: {name} is {top[name]}; it must be above 0")
    melt = {key: _plain(value) for key, value in content.get("melt", {}).items()}
    check_keys(melt, _MELT_FIELDS, f"{file}: section melt")
    for section, kind, fields in (("model", LoopLMConfig, model), ("melt", MeltConfig, melt)):
        try:
            kind(**fields)
        except CONFIG_ERRORS as error:
            raise ConfigError(f"{file}: section {section}: {innermost(error)}") from error
    made: dict[str, Any] = {
        name: _stage(name, content[name], top.get("seed", 0), file) for name in STAGES if name in content
    }
    first, second = made.get("phase1"), made.get("phase2")
    if first and first.training.steps and second and second.checkpoint:
        raise ConfigError(f"{file}: section phase2: checkpoint is what it starts from, so phase1 would have no effect")
    if not model and isinstance(made.get("teacher"), Stage):
        raise ConfigError(f"{file}: section model is missing; it says what teacher to train, in LoopLMConfig's fields")
    return RunConfig(file=file, data=dict(content["data"]), model=model, melt=melt, **top, **made)


def _check_sections(content: Mapping[str, Any], file: Path) -> None:
    for name in ("data", "model", "melt", *STAGES):
        if name in content and not isinstance(content[name], dict):
            raise ConfigError(f"{file}: section {name} is {content[name]!r}; it must be a mapping of keys to values")
    stages = [name for name in STAGES if name in content]
    if not stages:
        raise ConfigError(f"{file} has no stage; it needs at least one of the sections {', '.join(STAGES)}")
    if "data" not in content:
        raise ConfigError(f"{file}: section data is missing; it says what to train on")
    alone = stages == ["gate"] and "checkpoint" in content["gate"]
    if "teacher" not in content and not alone:
        raise ConfigError(
            f"{file}: section teacher is missing; it must say how to train one, or name a LoopLM: `checkpoint: DIR`"
        )


def _stage(name: str, section: Mapping[str, Any], seed: int, file: Path) -> Stage | Path:
    where = f"{file}: section {name}"
    checkpoint: Path | None = None
    if name != "phase1" and "checkpoint" in section:
        if name == "teacher" and len(section) > 1:
            others = ", ".join(key for key in map(str, section) if key != "checkpoint")
            raise ConfigError(f"{where}: checkpoint is a finished teacher, so {others} would have no effect")
        checkpoint = local_directory(_convert(section["checkpoint"], Path, f"{where}: checkpoint"), CHECKPOINT)
        if not checkpoint.is_dir():
            raise ConfigError(f"{where}: checkpoint {checkpoint} is not a directory")
        if name == "teacher":
            return checkpoint
        section = {key: value for key, value in section.items() if key != "checkpoint"}
    options = _OPTIONS[name]
    names = [{f.name for f in dataclasses.fields(kind)} for kind in (StageConfig, options)]
    check_keys(section, names[0] | names[1], where)
    if "steps" not in section:
        raise ConfigError(f"{where}: steps is missing")
    if name == "teacher" and section["steps"] == 0:
        raise ConfigError(f"{where}: steps is 0; a teacher must be trained, or be named: `checkpoint: DIR`")
    values = {"seed": seed, **_DEFAULTS[name], **section}
    training, told = ({key: value for key, value in values.items() if key in known} for known in names)
    return Stage(build(StageConfig, training, where), build(options, told, where), checkpoint)


def build(kind: type[T], section: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a section of the file.

    Raises ConfigError for unknown keys, wrong types and wrong values.
    """
    values = _fields(kind, section, where)
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _fields(kind: type, section: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    check_keys(section, hints, where)
    return {key: _convert(value, hints[key], f"{where}: {key}") for key, value in section.items()}


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Convert ``value`` to the type of a dataclass's field. Raises ConfigError."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        return _convert(value, next(kind for kind in inner if kind is not type(None)), where)
    if origin in (tuple, Sequence):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {value!r}; it must be a list")
        if origin is tuple and Ellipsis not in inner and len(value) != len(inner):
            raise ConfigError(f"{where} is {value!r}; it must be a list of {len(inner)}")
        return tuple(_convert(item, inner[0], where) for item in value)
    if hint in (int, float):
        value = _plain(value)
    if hint is Path and isinstance(value, str) and value:
        return Path(value).expanduser()
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int and number and math.isfinite(value) and value == int(value):
        return int(value)
    if hint is float and number and math.isfinite(value):
        return float(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    wanted = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", Path: "a path"}
    raise ConfigError(f"{where} is {value!r}; it must be {wanted.get(hint, hint)}")


def _plain(value: Any) -> Any:
    """Return the value, with text such as "3e-3", which YAML 1.1 does not read as a number, as that number."""
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value
