"""Calibration of the early exit: the criterion that saves the most loops and keeps the quality that was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from melt_models.tensors import Weights
from melt_runtime import ArgumentError, Runtime
from melt_runtime.decoding.exit_criteria import CRITERIA, NEVER
from melt_runtime.package.manifest import Manifest
from melt_runtime.package.reader import Package
from melt_runtime.progress import Step, no_progress
from numpy.typing import NDArray

from ..options import ExitOptions
from ..quantization.calibration import documentation
from ..reference.texts import encode_text
from .distances import log_softmax
from .exact_match import read_problems
from .expected import LARGE_BYTES

_SEQUENCES, _LENGTH = 32, 48  # of a text, in tokens
_LARGE_SEQUENCES, _LARGE_LENGTH = 8, 16  # for a model that takes seconds per token
_PROBLEMS = 200
_STEPS = 16  # thresholds to choose from, per criterion


@dataclass(frozen=True)
class Run:
    """What tokens gave under some criteria, per sequence or problem, all (items,).

    ``loss``: their summed cross-entropy, in nats, 0 for problems. ``said``: the best token of each position, or the
    answer. ``loops``, ``tokens``: loops run, and tokens that they were run for.
    """

    loss: NDArray[np.float64]
    said: list[tuple[int, ...]]
    loops: NDArray[np.int64]
    tokens: NDArray[np.int64]

    def half(self, which: int) -> Run:
        """Return every second item, from the first or the second on."""
        part = slice(which, None, 2)
        return Run(self.loss[part], self.said[part], self.loops[part], self.tokens[part])

    @property
    def mean_loops(self) -> float:
        return float(self.loops.sum() / self.tokens.sum())


class Sample(Protocol):
    """What the exit is calibrated on. ``whole``: whether an item is right or wrong as a whole."""

    name: str
    whole: bool

    def run(self, exits: str) -> Run: ...


class TextSample:
    """Sequences of one length, read token by token as answers are written."""

    whole = False

    def __init__(self, runtime: Runtime, sequences: list[list[int]], name: str):
        self.runtime, self.sequences, self.name = runtime, sequences, name

    def run(self, exits: str) -> Run:
        most, parts = self.runtime.manifest.max_batch, []
        for at in range(0, len(self.sequences), most):
            parts.append(self._together(self.sequences[at : at + most], exits))
        loss, loops, tokens = (
            np.concatenate([getattr(p, name) for p in parts]) for name in ("loss", "loops", "tokens")
        )
        return Run(loss, [said for part in parts for said in part.said], loops, tokens)

    def _together(self, sequences: list[list[int]], exits: str) -> Run:
        driver, settings = self.runtime.driver(len(sequences)), self.runtime.options(exit=exits).loops
        ids, said, loss = np.array(sequences), [], np.zeros(len(sequences))
        for at in range(ids.shape[1] - 1):
            logs = log_softmax(driver.append(ids[:, at : at + 1].tolist(), settings))
            loss -= np.take_along_axis(logs, ids[:, at + 1, None], -1)[:, 0]
            said.append(logs.argmax(-1))
        loops = np.array([sum(depth) for depth in driver.depth])
        return Run(loss, [tuple(row) for row in np.stack(said, 1).tolist()], loops, np.full(len(ids), ids.shape[1] - 1))


class ProblemSample:
    """Prompts whose answers are written greedily."""

    whole = True

    def __init__(self, runtime: Runtime, prompts: list[list[int]], tokens: int, name: str):
        self.runtime, self.prompts, self.tokens, self.name = runtime, prompts, tokens, name

    def run(self, exits: str) -> Run:
        written = self.runtime.generate(self.prompts, max_tokens=self.tokens, exit=exits)
        loops = np.array([sum(one.depth[one.prompt_tokens :]) for one in written])
        count = np.array([len(one.depth) - one.prompt_tokens for one in written])
        said = [tuple(one.token_ids) for one in written]
        return Run(np.zeros(len(written)), said, loops, np.maximum(count, 1))


@dataclass(frozen=True)
class Loss:
    """What was lost against all loops: growth of the perplexity in %, or disagreement in points.

    ``sure``: the same plus a standard error, which few items make large.
    """

    value: float
    sure: float


def lost(run: Run, full: Run, unit: str, whole: bool) -> Loss:
    """Compare a run with one of all loops. ``whole``: whether an item is right or wrong as a whole."""
    if unit == "%":
        per_item = (run.loss - full.loss) / full.tokens
    else:
        pairs = zip(run.said, full.said, strict=True)
        per_item = np.array([a != b if whole else np.mean(np.array(a) != np.array(b)) for a, b in pairs], np.float64)
    mean = float(per_item.mean())
    error = float(per_item.std(ddof=1) / math.sqrt(len(per_item))) if len(per_item) > 1 else 0.0
    scale = math.expm1 if unit == "%" else float
    return Loss(100 * scale(mean), 100 * scale(mean + error))


def thresholds(name: str, vocabulary: int) -> list[float]:
    """Return values of a criterion, from the one that ends most loops to the strictest."""
    if name == "gate":
        return [1 - value for value in np.geomspace(0.9, 1e-4, _STEPS)]
    if name == "margin":
        return [1 - value for value in np.geomspace(0.95, 1e-3, _STEPS)]
    first = {"entropy": math.log(vocabulary), "kl": 3.0, "change": 1.0}[name]
    return list(np.geomspace(first, first / 2000, _STEPS))


def head_share(weights: Weights) -> float:
    """Return what a run of the head, with a coda, costs: its weights as a share of those of a loop."""
    sizes = {name: math.prod(weights[name].shape) for name in weights}
    loop = sum(size for name, size in sizes.items() if name.startswith("model.layers."))
    coda = sum(size for name, size in sizes.items() if name.startswith("model.coda_layers."))
    head = sizes.get("lm_head.weight") or sizes["model.embed_tokens.weight"]
    return (head + coda) / loop


def calibrate(sample: Sample, manifest: Manifest, options: ExitOptions, share: float, progress: Step) -> dict[str, Any]:
    """Return the manifest's entry: the cheapest criterion that keeps ``options`` on both halves of a sample.

    A criterion's threshold is searched on one half; while the other half loses more, a stricter one is taken. A half
    keeps the quality if its loss plus a standard error does. What reads the head costs ``share`` of a loop after every
    loop but the last. Every value that is stated is of the second half.
    """
    full = sample.run(NEVER)
    names = [name for name, one in CRITERIA.items() if not one.whole and (name != "gate" or _has_gate(manifest))]
    best: tuple[float, str, float, float] = (float(manifest.loops), NEVER, 0.0, full.half(1).mean_loops)
    for name in names:
        progress("calibrating the exit", len(names), 1)
        grid, runs = thresholds(name, manifest.vocab_size), dict[int, Run]()

        def keeps(at: int, half: int, name: str = name, grid: list[float] = grid, runs: dict[int, Run] = runs) -> bool:
            runs[at] = runs.get(at) or sample.run(f"{name}:{grid[at]:.4g}")
            return lost(runs[at].half(half), full.half(half), options.unit, sample.whole).sure <= options.most

        low, high = 0, len(grid)  # the first that keeps it, if the loss falls with strictness
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if keeps(middle, 0) else (middle + 1, high)
        chosen = next((at for at in range(low, len(grid)) if keeps(at, 0) and keeps(at, 1)), None)
        if chosen is None:
            continue
        run = runs[chosen].half(1)
        heads = share * min(run.mean_loops, manifest.loops - 1) if CRITERIA[name].reads == "head" else 0.0
        if run.mean_loops + heads < best[0]:
            loss = lost(run, full.half(1), options.unit, sample.whole).value
            best = (run.mean_loops + heads, f"{name}:{grid[chosen]:.4g}", loss, run.mean_loops)
    _, criteria, loss, loops = best
    return {
        "criteria": criteria,
        "quality": options.quality.removeprefix("auto:"),
        "text": sample.name,
        "tokens": int(full.half(1).tokens.sum()),
        "loss": round(loss, 4),
        "loops": round(loops, 4),
        "full_loops": manifest.loops,
    }


def calibrated_exit(
    directory: Path, manifest: Manifest, options: ExitOptions, weights: Weights, progress: Step = no_progress
) -> dict[str, Any]:
    """Calibrate a package that is written; see ``calibrate``. Raises ArgumentError for a text that cannot be used."""
    if manifest.cache_loops is not None:
        raise ArgumentError(
            "--exit needs a MELT or --share-caches: the tokens of a LoopLM cannot leave the loops early"
        )
    if manifest.loops < 2:
        raise ArgumentError("--exit has nothing to save: the package runs one loop per token")
    runtime = Runtime.load(directory, backend="onnxruntime", check_hashes=False)
    return calibrate(_sample(runtime, options), manifest, options, head_share(weights), progress)


def _has_gate(manifest: Manifest) -> bool:
    return manifest.has_exit_gate and "early_exit_gate" not in manifest.untrained


def _sample(runtime: Runtime, options: ExitOptions) -> Sample:
    """Open the text or the problems. Raises ArgumentError."""
    path, manifest, directory = options.text, runtime.manifest, runtime.package.directory
    if path is not None and path.suffix == ".jsonl":
        if options.unit == "%":
            raise ArgumentError(f"--exit-text {path} has problems, on which --exit takes points, such as auto:1pt")
        problems = read_problems(path, Package.open(directory, check_hashes=False), "--exit-text")[:_PROBLEMS]
        if len(problems) < 2:
            raise ArgumentError(f"--exit-text {path} has 1 problem; it must have 2 or more, to search and to check")
        prompts = [list(problem.prompt) for problem in problems]
        return ProblemSample(runtime, prompts, max(one.tokens for one in problems), path.name)
    ids = encode_text(directory, path, documentation, option="--exit-text", refused=ArgumentError)
    if ids is None:
        raise ArgumentError(
            "--exit needs --exit-text: the package's vocabulary is too small for the built-in text; a .jsonl file "
            'gives problems, lines with "prompt" and "answer"'
        )
    large = manifest.weights_bytes > LARGE_BYTES
    count, length = (_LARGE_SEQUENCES, _LARGE_LENGTH) if large else (_SEQUENCES, _LENGTH)
    sequences = _spread(ids, count, min(length, manifest.max_seq_len))
    return TextSample(runtime, sequences, "Python's documentation" if path is None else path.name)


def _spread(ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """Return up to ``count`` sequences of ``length`` tokens, spread over a text. Raises ArgumentError."""
    most = min(count, len(ids) // length)
    if most < 2:
        raise ArgumentError(f"--exit-text has {len(ids)} tokens; it must have {2 * length} or more")
    step = len(ids) // most
    return [list(ids[at * step : at * step + length]) for at in range(most)]
