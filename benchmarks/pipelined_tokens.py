"""The sections "identity", "trained" and "melt" of pipelined.py: the tokens of pipelined decoding, and their runs."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from melt_models import LoopLMConfig
from melt_models.training.tasks import Addition, Example
from melt_runtime import LoopSettings, Runtime
from melt_runtime.decoding.generator import Generator, TokenSequence
from melt_runtime.decoding.loop_driver import LoopDriver
from melt_runtime.decoding.pipeline import Pipelining
from melt_runtime.progress import Step
from numpy.typing import NDArray
from random_checkpoint import make

from melt_export.export import building
from melt_export.options import ExportOptions
from melt_export.quantization.options import CacheOptions, WeightOptions

TRAINED_BY = "melt-train teacher --config examples/addition.yaml"
MELT_BY = "melt-train all --config examples/addition.yaml"
MELT = Path(__file__).resolve().parent.parent / "examples" / "addition-melt"
_TINY = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
_SMALL = {"vocab_size": 499, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 256}
SHAPES = {
    "1 layer, 4 heads": {**_TINY, "num_hidden_layers": 1, "num_attention_heads": 4},
    "2 layers, 4 heads on 2 of keys": {
        **_TINY,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "4 layers, 8 heads on 1 of keys": {
        **_SMALL,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "int4 weights": {"weights": WeightOptions("int4", method="rtn")},
    "int8 cache": {"cache": CacheOptions("int8")},
    "int4 cache": {"cache": CacheOptions("int4")},
}
# Whether a third of the columns pass a carry on, as in the 200 problems of examples/addition_problems.jsonl.
KINDS_OF_PROBLEMS = {"hard": True, "even": False}
_ANSWER = 28  # tokens per prompt of a random model
_MODES = ("plain", "every loop", "loop 1 alone")


class Difference(NamedTuple):
    """A place where plain and pipelined tokens differ.

    ``gap``: by how much plain decoding preferred its token. ``noise``: the largest difference between the logits of
    both ways so far.
    """

    place: int
    gap: float
    noise: float

    @property
    def tie(self) -> bool:
        """Whether the noise can turn the order of both tokens."""
        return self.gap <= 2 * self.noise


def identity(directory: Path, settings: Any, step: Step, report: dict[str, Any]) -> dict[str, Any]:
    """Compare the tokens of random models, greedy, by shape, number of loops and kind of package."""
    combinations = list(product(SHAPES, settings.identity_loops, KINDS))
    prompts = -(-settings.identity_tokens // (len(combinations) * _ANSWER))
    found = []
    for shape, loops, kind in combinations:
        package = _random_package(directory / "identity", shape, loops, kind)
        found.append({"shape": shape, "loops": loops, "kind": kind, **compare(Runtime.load(package), prompts)})
        step("tokens of random models", len(combinations), 1)
        shutil.rmtree(directory / "identity")
    return {"results": found}


def _random_package(directory: Path, shape: str, loops: int, kind: str) -> Path:
    make(directory / "checkpoint", LoopLMConfig(**{**SHAPES[shape], "total_ut_steps": loops}), seed=loops)
    with building(directory / "checkpoint", directory / "package", ExportOptions(**KINDS[kind])):
        pass
    return directory / "package"


def compare(runtime: Runtime, prompts: int, count: int = _ANSWER) -> dict[str, Any]:
    """Answer random prompts plainly and pipelined. Return tokens, runs, the logits' noise, and what differed."""
    random = np.random.default_rng(prompts)
    tokens = runs = 0
    noise, differences = 0.0, []
    for _ in range(prompts):
        prompt = random.integers(0, runtime.manifest.vocab_size, random.integers(2, 40)).tolist()
        options: dict[str, Any] = {"max_tokens": count, "ignore_eos": True}
        plain = runtime.generate(prompt, pipeline="off", **options)
        piped = runtime.generate(prompt, pipeline="on", **options)
        assert piped.pipeline is not None
        tokens += len(plain.token_ids)
        runs += piped.pipeline.runs
        rows = _both_rows(runtime, prompt, plain.token_ids)
        noise = max(noise, *(float(np.abs(one - other).max()) for one, other in rows))
        if plain.token_ids != piped.token_ids:
            differences.append(_difference(rows, plain.token_ids, piped.token_ids)._asdict())
    ties = sum(Difference(**one).tie for one in differences)
    fed = tokens - prompts  # an answer's first token comes from the prompt
    return {
        "tokens": tokens,
        "runs_per_token": runs / fed,
        "noise": noise,
        "differences": differences,
        "ties": ties,
    }


def _both_rows(
    runtime: Runtime, prompt: Sequence[int], tokens: Sequence[int]
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return the logits (vocab,) after each of the tokens but the last, by plain and by pipelined decoding."""
    settings, rows = LoopSettings(runtime.manifest.loops), []
    plain, piped = runtime.driver(), runtime.driver()
    for driver in (plain, piped):
        driver.append([prompt], settings)
    drafting = Pipelining(lambda logits, ahead: int(logits.argmax()))
    for token in tokens[:-1]:
        alone = plain.advance([[token]], settings).row(0).copy()
        rows.append((alone, piped.advance([[token]], settings, pipelining=drafting).row(0).copy()))
    return rows


def _difference(
    rows: list[tuple[NDArray[np.float32], NDArray[np.float32]]], plain: Sequence[int], piped: Sequence[int]
) -> Difference:
    """Describe the first place where the tokens differ; the first of both is the prompt's own and must be equal."""
    place = next(at for at, (one, other) in enumerate(zip(plain, piped, strict=True)) if one != other)
    if place == 0:
        return Difference(0, float("inf"), 0.0)
    row = rows[place - 1][0]
    noise = max(float(np.abs(one - other).max()) for one, other in rows[:place])
    return Difference(place, float(row[plain[place]] - row[piped[place]]), noise)


def trained(directory: Path, settings: Any, step: Step, report: dict[str, Any]) -> dict[str, Any]:
    """Answer held-out additions with a trained LoopLM, whose tokens pipelined decoding must not change."""
    runtime, task = loaded(settings.teacher, directory / "teacher"), Addition()
    problems = [
        problem for hard in KINDS_OF_PROBLEMS.values() for problem in task.test_set(settings.problems, hard=hard)
    ]
    patterns = Counter(
        pattern for problem in problems for pattern in opinions(runtime, problem.prompt, task.answer_tokens)
    )
    return {
        "trained_by": TRAINED_BY,
        **_answers(runtime, settings.problems, step),
        "opinions": {"".join("01"[right] for right in pattern): count for pattern, count in patterns.items()},
    }


def staggered(directory: Path, settings: Any, step: Step, report: dict[str, Any]) -> dict[str, Any]:
    """Answer held-out additions with the MELT that the repository ships, whose loops share a cache."""
    runtime = loaded(MELT, directory / "melt")
    return {"trained_by": MELT_BY, **_answers(runtime, settings.problems, step)}


def loaded(checkpoint: Path, package: Path) -> Runtime:
    """Load a checkpoint's package, exported unless it exists."""
    if not package.is_dir():
        with building(checkpoint, package, ExportOptions()):
            pass
    return Runtime.load(package)


def _answers(runtime: Runtime, count: int, step: Step) -> dict[str, Any]:
    """Answer problems of every kind greedily, plain and pipelined; one kind also sampled, and at every depth."""
    most, results = runtime.manifest.loops, []
    ways = [("hard", loops, 0.0) for loops in range(2, most + 1)]
    for kind, loops, temperature in [*ways, ("hard", most, 1.0), ("even", most, 0.0)]:
        problems, found = Addition().test_set(count, hard=KINDS_OF_PROBLEMS[kind]), dict[str, Any]()
        for mode in _MODES:
            found[mode] = [
                _answer(runtime, problem.prompt, mode, loops, temperature, seed)
                for seed, problem in enumerate(problems)
            ]
            step("held-out additions", len(_MODES) * (most + 1), 1)
        modes = {mode: _used(found[mode], found["plain"], problems, loops) for mode in _MODES}
        results.append({"problems": kind, "loops": loops, "temperature": temperature, "modes": modes})
    return {"loops": most, "problems": count, "results": results}


def _answer(runtime: Runtime, prompt: str, mode: str, loops: int, temperature: float, seed: int) -> Any:
    """Answer one problem and return its Generation. ``mode``: one of _MODES."""
    options = runtime.options(
        max_tokens=8, loops=loops, temperature=temperature, seed=seed, pipeline="off" if mode == "plain" else "on"
    )
    generator = Generator(runtime.driver(), [runtime.encode(prompt)], options, runtime.tokenizer)
    sequence = generator.sequences[0]
    if mode == "loop 1 alone":
        drafts = Pipelining(FirstLoopDrafts(generator.driver, sequence))
        sequence.pipelining = lambda: drafts  # type: ignore[method-assign]
    for _ in generator:
        pass
    return generator.results()[0]


class FirstLoopDrafts:
    """Drafts a sequence's tokens from their first loop alone; what later loops say is not looked at."""

    def __init__(self, driver: LoopDriver, sequence: TokenSequence):
        self.driver, self.sequence = driver, sequence
        self._said: dict[tuple[int, ...], int | None] = {}

    def __call__(self, logits: NDArray[np.float32], ahead: Sequence[int]) -> int | None:
        assert self.driver.pipeline is not None
        before = (*self.sequence.history, *ahead)
        if before not in self._said or self.driver.pipeline.ran(0)[len(ahead)] == 1:
            self._said[before] = self.sequence.draft(logits, ahead)
        return self._said[before]


def _used(answers: Sequence[Any], plain: Sequence[Any], problems: Sequence[Example], loops: int) -> dict[str, Any]:
    """Return how many answers are right and equal plain decoding's, runs per token, drafts held and dropped by loop."""
    uses = [one.pipeline for one in answers]
    found = {
        "right": sum(one.text == problem.answer for one, problem in zip(answers, problems, strict=True)),
        "same": sum(one.token_ids == other.token_ids for one, other in zip(answers, plain, strict=True)),
    }
    if None in uses:
        return {**found, "runs_per_token": float(loops), "rows_per_run": 1.0, "held": [], "dropped": []}
    runs, tokens, rows = (sum(getattr(use, name) for use in uses) for name in ("runs", "tokens", "rows"))
    held, dropped = (
        np.sum([getattr(use, name) for use in uses], axis=0)[: loops - 1].tolist() for name in ("held", "dropped")
    )
    return {
        **found,
        "runs_per_token": runs / tokens,
        "rows_per_run": rows / runs,
        "held": held,
        "dropped": dropped,
    }


def opinions(runtime: Runtime, prompt: str, count: int) -> list[tuple[bool, ...]]:
    """Return, for each token of a greedy answer that may be drafted, whether each loop but the last predicted it.

    The answer has ``count`` tokens. The first comes from the prompt, and behind the last, its end, nothing is decoded.
    """
    driver, settings = runtime.driver(), LoopSettings(runtime.manifest.loops)
    token = int(driver.append([runtime.encode(prompt)], settings)[0].argmax())
    column, found = np.zeros((1, 1), np.int64), []
    for _ in range(count - 2):
        [chunk] = driver.chunks([[token]])
        said = [int(driver.state.logits(column)[0, 0].argmax()) for _ in driver.loops(chunk, settings)]
        token = said[-1]
        found.append(tuple(one == token for one in said[:-1]))
    return found
