"""Calibration of the early exit: the criterion and the most loops that cost least and keep the quality asked for."""

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
from melt_runtime.decoding.settings import LoopSettings
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
_STEPS = 64  # thresholds to choose from, per criterion
_STRIDE = 8  # every eighth is tried; those between two only where they may be the best
_ALL_DEPTHS = 8  # up to so many loops, every smaller number of loops at most is tried
_SOME_DEPTHS = 5  # with more, so many of them


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

    def run(self, exits: str, most: int) -> Run:
        """Run all items under criteria, with ``most`` loops per token at most."""


class TextSample:
    """Sequences of one length, read token by token as answers are written."""

    whole = False

    def __init__(self, runtime: Runtime, sequences: list[list[int]], name: str):
        self.runtime, self.sequences, self.name = runtime, sequences, name

    def run(self, exits: str, most: int) -> Run:
        size, parts = self.runtime.manifest.max_batch, []
        settings = self.runtime.options(exit=exits, loops=most).loops
        for at in range(0, len(self.sequences), size):
            parts.append(self._together(self.sequences[at : at + size], settings))
        loss, loops, tokens = (
            np.concatenate([getattr(p, name) for p in parts]) for name in ("loss", "loops", "tokens")
        )
        return Run(loss, [said for part in parts for said in part.said], loops, tokens)

    def _together(self, sequences: list[list[int]], settings: LoopSettings) -> Run:
        driver = self.runtime.driver(len(sequences))
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

    def run(self, exits: str, most: int) -> Run:
        written = self.runtime.generate(self.prompts, max_tokens=self.tokens, exit=exits, loops=most)
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
    if name in ("gate", "margin"):  # probabilities: even steps of the log-odds
        odds = np.linspace(*((-2.2, 9.2) if name == "gate" else (-2.9, 6.9)), _STEPS)
        return list(1 / (1 + np.exp(-odds)))
    first = {"entropy": math.log(vocabulary), "kl": 3.0, "change": 1.0}[name]
    return list(np.geomspace(first, first / 500, _STEPS))


def head_share(weights: Weights) -> float:
    """Return what a run of the head, with a coda, costs: its weights as a share of those of a loop."""
    sizes = {name: math.prod(weights[name].shape) for name in weights}
    loop = sum(size for name, size in sizes.items() if name.startswith("model.layers."))
    coda = sum(size for name, size in sizes.items() if name.startswith("model.coda_layers."))
    head = sizes.get("lm_head.weight") or sizes["model.embed_tokens.weight"]
    return (head + coda) / loop


@dataclass(frozen=True)
class Setting:
    """Criteria with at most ``most`` loops per token, and what they gave.

    ``keeps``: whether both halves of the sample keep the quality. Of the second half: ``loops`` per token, ``loss``,
    and ``cost``, the loops with what the runs of the head take, in loops.
    """

    exits: str
    most: int
    keeps: bool
    cost: float
    loss: float
    loops: float

    def better(self, other: Setting) -> bool:
        """Whether it costs less than another setting, or as much and loses less."""
        mine, others = ((round(one.cost, 4), one.loss) for one in (self, other))
        return mine < others


class Search:
    """The search for the cheapest setting that keeps ``options`` on both halves of a sample.

    Every setting is measured as it decodes, because the depth of a MELT's token changes what later tokens read. Few
    are measured: the smallest fixed depth that keeps the quality bounds the cost, and a threshold that costs more than
    ``best`` is not tried with more loops at most, where it costs as much or more.
    """

    def __init__(self, sample: Sample, manifest: Manifest, options: ExitOptions, share: float):
        self.sample, self.options, self.share = sample, options, share
        self.full = sample.run(NEVER, manifest.loops)
        self.best = Setting(NEVER, manifest.loops, True, manifest.loops, 0.0, self.full.half(1).mean_loops)
        self._measured: dict[tuple[str, int], Setting] = {}

    def fixed(self, depths: Sequence[int]) -> None:
        """Take the smallest of ``depths`` (ascending) that keeps the quality where all tokens run so many loops."""
        found = next((one for depth in depths if (one := self.measured(NEVER, depth)).keeps), None)
        if found is not None:
            self.best = found

    def measured(self, exits: str, most: int) -> Setting:
        """Run the sample with a setting, once."""
        if (exits, most) not in self._measured:
            self._measured[exits, most] = self._measure(exits, most)
        return self._measured[exits, most]

    def _measure(self, exits: str, most: int) -> Setting:
        run, whole, unit = self.sample.run(exits, most), self.sample.whole, self.options.unit
        losses = [lost(run.half(half), self.full.half(half), unit, whole) for half in (0, 1)]
        keeps = all(loss.sure <= self.options.most for loss in losses)
        loops, name = run.half(1).mean_loops, exits.partition(":")[0]
        heads = self.share * min(loops, most - 1) if name in CRITERIA and CRITERIA[name].reads == "head" else 0.0
        return Setting(exits, most, keeps, loops + heads, losses[1].value, loops)

    def criterion(self, name: str, grid: Sequence[float], most: int, end: int) -> int:
        """Take the loosest threshold that keeps the quality, if it is better than ``best``.

        ``grid``: thresholds, strictest last; those from ``end`` on are known to cost too much. Returns the ``end`` for
        more loops at most.
        """

        def stops(index: int) -> bool:
            one = self._at(name, grid, index, most)
            return one.keeps or one.cost > self.best.cost

        if end == 0:
            return end
        # In strides from the loosest on: where later loops make tokens worse, stricter thresholds may lose more.
        failed = -1
        for index in dict.fromkeys([*range(_STRIDE - 1, end, _STRIDE), end - 1]):
            if stops(index):
                break
            if self._at(name, grid, index, most).loops >= most:
                return end  # no token leaves earlier, nor would any at a stricter one
            failed = index
        else:
            return end
        low, high = failed + 1, index
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if stops(middle) else (middle + 1, high)
        if (found := self._at(name, grid, low, most)).keeps and found.better(self.best):
            self.best = found
        return low

    def _at(self, name: str, grid: Sequence[float], index: int, most: int) -> Setting:
        return self.measured(f"{name}:{grid[index]:.4g}", most)


def depths(loops: int) -> list[int]:
    """Return the numbers of loops at most that are tried: all up to ``loops``, or some where there are many."""
    if loops <= _ALL_DEPTHS:
        return list(range(1, loops + 1))
    return [round(depth) for depth in np.geomspace(1, loops, _SOME_DEPTHS)]


def calibrate(sample: Sample, manifest: Manifest, options: ExitOptions, share: float, progress: Step) -> dict[str, Any]:
    """Return the manifest's entry: the cheapest setting that keeps ``options`` on both halves of a sample.

    Tried are fixed depths, and every criterion with several numbers of loops at most; of its thresholds the loosest one
    that keeps the quality on both halves. A half keeps it if its loss plus a standard error does. What reads the head
    costs ``share`` of a loop after every loop but the last. Every value that is stated is of the second half.
    """
    tried, names = depths(manifest.loops), _criteria(manifest)
    steps = len(tried) - 1 + len(names) * len(tried)

    def done(count: int) -> None:
        progress("calibrating the exit", steps, count)

    done(0)
    search = Search(sample, manifest, options, share)
    search.fixed(tried[:-1])
    done(len(tried) - 1)
    grids = {name: thresholds(name, manifest.vocab_size) for name in names}
    ends = {name: len(grid) for name, grid in grids.items()}
    # Where fewer loops for all change too many words, tokens that leave earlier still change more.
    least = search.best.most if options.unit == "pt" else 1
    for most in tried:
        for name, grid in grids.items():
            if least <= most and CRITERIA[name].first < min(most, search.best.cost):
                ends[name] = search.criterion(name, grid, most, ends[name])
            done(1)
    best = search.best
    return {
        "criteria": best.exits,
        "quality": options.quality.removeprefix("auto:"),
        "text": sample.name,
        "tokens": int(search.full.half(1).tokens.sum()),
        "loss": round(best.loss, 4),
        "loops": round(best.loops, 4),
        "full_loops": manifest.loops,
        **({"most_loops": best.most} if best.most < manifest.loops else {}),
    }


def calibrated_exit(
    directory: Path, manifest: Manifest, options: ExitOptions, weights: Weights, progress: Step = no_progress
) -> dict[str, Any]:
    """Calibrate a package that is written; see ``calibrate``. Raises ArgumentError for a text that cannot be used."""
    runtime = Runtime.load(directory, backend="onnxruntime", check_hashes=False)
    return calibrate(_sample(runtime, options), manifest, options, head_share(weights), progress)


def check_exit(checkpoint: Path, loops: int, options: ExitOptions) -> None:
    """Raise ArgumentError, before an export, for a calibration that could not follow it. ``checkpoint``: its directory,
    which has the tokenizer; ``loops``: the package's."""
    if loops < 2:
        raise ArgumentError("--exit has nothing to save: the package runs one loop per token")
    if not _problems(options):
        _text(checkpoint, options)


def _criteria(manifest: Manifest) -> list[str]:
    """Return the criteria that can end a token's loops; none in a LoopLM, whose tokens all run equally many."""
    gated = manifest.has_exit_gate and "early_exit_gate" not in manifest.untrained
    able = (name for name, one in CRITERIA.items() if not one.whole and (name != "gate" or gated))
    return list(able) if manifest.cache_loops is None else []


def _sample(runtime: Runtime, options: ExitOptions) -> Sample:
    """Open the text or the problems. Raises ArgumentError."""
    path, manifest, directory = options.text, runtime.manifest, runtime.package.directory
    if path is not None and _problems(options):
        problems = read_problems(path, Package.open(directory, check_hashes=False), "--exit-text")[:_PROBLEMS]
        if len(problems) < 2:
            raise ArgumentError(f"--exit-text {path} has 1 problem; it must have 2 or more, to search and to check")
        prompts = [list(problem.prompt) for problem in problems]
        return ProblemSample(runtime, prompts, max(one.tokens for one in problems), path.name)
    ids = _text(directory, options)
    large = manifest.weights_bytes > LARGE_BYTES
    count, length = (_LARGE_SEQUENCES, _LARGE_LENGTH) if large else (_SEQUENCES, _LENGTH)
    sequences = _spread(ids, count, min(length, manifest.max_seq_len))
    return TextSample(runtime, sequences, "Python's documentation" if path is None else path.name)


def _problems(options: ExitOptions) -> bool:
    """Whether the calibration reads problems instead of a text. Raises ArgumentError for a quality that these lack."""
    found = options.text is not None and options.text.suffix == ".jsonl"
    if found and options.unit == "%":
        raise ArgumentError(f"--exit-text {options.text} has problems, on which --exit takes points, such as auto:1pt")
    return found


def _text(directory: Path, options: ExitOptions) -> Sequence[int]:
    """Tokenize the text with a directory's tokenizer. Raises ArgumentError."""
    ids = encode_text(directory, options.text, documentation, option="--exit-text", refused=ArgumentError)
    if ids is None:
        raise ArgumentError(
            "--exit needs --exit-text: the package's vocabulary is too small for the built-in text; a .jsonl file "
            'gives problems, lines with "prompt" and "answer"'
        )
    return ids


def _spread(ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """Return up to ``count`` sequences of ``length`` tokens, spread over a text. Raises ArgumentError."""
    most = min(count, len(ids) // length)
    if most < 2:
        raise ArgumentError(f"--exit-text has {len(ids)} tokens; it must have {2 * length} or more")
    step = len(ids) // most
    return [list(ids[at * step : at * step + length]) for at in range(most)]
