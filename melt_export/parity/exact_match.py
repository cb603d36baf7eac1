"""Exact answers to a task's problems as a measure of quality, by a package and by its checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from melt_runtime import ArgumentError, Runtime
from melt_runtime.package.reader import Package
from melt_runtime.progress import Step, no_progress
from melt_runtime.text.end_tokens import stop_ids_of
from melt_runtime.text.tokenizer import TextTokenizer

from ..reference.pytorch import Reference


@dataclass(frozen=True)
class Problem:
    """A prompt, and the exact answer to write before the stop.

    ``tokens``: the most tokens to write, the stop included.
    """

    prompt: tuple[int, ...]
    answer: str
    tokens: int


def read_problems(path: Path, package: Package, option: str = "--eval-answers") -> list[Problem]:
    """Read problems from JSON lines with "prompt" and "answer". Raises ArgumentError for an invalid line.

    ``option``: the command-line option of the file, for messages.
    """
    if not (package.directory / "tokenizer.json").is_file():
        raise ArgumentError(f"{option} needs a tokenizer, and the package has none")
    tokenizer, found = TextTokenizer.load(package.directory, package.manifest.files), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{option} {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            question, answer = content["prompt"], content["answer"]
            if not isinstance(question, str) or isinstance(answer, bool) or not isinstance(answer, str | int | float):
                raise TypeError("prompt must be text, and answer text or a number")
            prompt, answer = tokenizer.encode(question), str(answer)
            tokens = len(tokenizer.encode(answer, add_special_tokens=False)) + 1
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArgumentError(
                f'{path}, line {number} is not a JSON object with "prompt" and "answer": {error!r}'
            ) from error
        if not prompt or len(prompt) + tokens > package.manifest.max_seq_len:
            raise ArgumentError(
                f"{path}, line {number} does not fit the package's {package.manifest.max_seq_len} tokens"
            )
        found.append(Problem(tuple(prompt), answer, tokens))
    if not found:
        raise ArgumentError(f"{option} {path} has no line")
    return found


def checkpoint_accuracy(
    reference: Reference, package: Package, problems: list[Problem], progress: Step = no_progress
) -> float:
    """Return the share of problems that PyTorch answers, decoding greedily."""
    tokenizer, stops = TextTokenizer.load(package.directory, package.manifest.files), stop_ids_of(package)
    right = 0
    for problem in problems:
        written, _ = reference.greedy(problem.prompt, problem.tokens, package.manifest.loops, package.manifest.chunk)
        end = next((at for at, token in enumerate(written) if token in stops), len(written))
        right += tokenizer.decode(written[:end]) == problem.answer
        progress("PyTorch: answers", len(problems), 1)
    return right / len(problems)


def package_accuracy(
    runtime: Runtime, problems: list[Problem], progress: Step = no_progress, pipeline: str = "auto"
) -> float:
    """Return the share of problems that a package answers, decoding greedily at full depth."""
    right = 0
    for problem in problems:
        written = runtime.generate(
            list(problem.prompt), max_tokens=problem.tokens, exit_threshold=1.0, pipeline=pipeline
        )
        right += written.text == problem.answer
        progress("package: answers", len(problems), 1)
    return right / len(problems)
