"""The section "adaptive" of pipelined.py: tokens that leave the loops early, one after the other and pipelined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from melt_models.training.tasks import Addition, Example
from melt_runtime import Runtime
from melt_runtime.progress import Step
from pipelined_tokens import MELT, MELT_BY, loaded

# None ends no token. Values that keep nearly all answers, and one of the gate that does not.
CRITERIA: tuple[dict[str, float], ...] = (
    {},
    {"exit_threshold": 0.9},
    {"exit_threshold": 0.99},
    {"exit_kl": 0.001},
    {"exit_kl": 0.01},
    {"exit_same": 1},
    {"exit_same": 2},
)


def adaptive(directory: Path, settings: Any, step: Step, report: dict[str, Any]) -> dict[str, Any]:
    """Answer held-out additions with the MELT that the repository ships, by every criterion, plainly and pipelined."""
    runtime, results = loaded(MELT, directory / "melt"), []
    problems = Addition().test_set(settings.problems, hard=True)
    for criterion in CRITERIA:
        plain, piped = (answered(runtime, problems, criterion, way) for way in ("off", "on"))
        same = sum(one == other for one, other in zip(plain.pop("said"), piped.pop("said"), strict=True))
        results.append({"criterion": criterion, "plain": plain, "pipelined": piped, "same": same})
        step("tokens that leave early", len(CRITERIA), 1)
    return {"trained_by": MELT_BY, "problems": settings.problems, "loops": runtime.manifest.loops, "results": results}


def answered(
    runtime: Runtime, problems: Sequence[Example], criterion: dict[str, float], pipeline: str
) -> dict[str, Any]:
    """Answer problems greedily. Returns how many answers are right, mean loops and runs of the loop step per decoded
    token, and tokens with their depths ("said"). An answer's first token comes from the prompt and is not decoded."""
    right, loops, runs, said = 0, 0, 0, []
    for problem in problems:
        options: dict[str, Any] = {"max_tokens": 8, "exit_threshold": 1.0, **criterion, "pipeline": pipeline}
        found = runtime.generate(problem.prompt, **options)
        depth = found.depth[found.prompt_tokens :]
        right += found.text == problem.answer
        loops += sum(depth)
        runs += sum(depth) if found.pipeline is None else found.pipeline.runs
        said.append((found.token_ids, depth))
    tokens = sum(len(depth) for _, depth in said)
    return {"right": right, "loops_per_token": loops / tokens, "runs_per_token": runs / tokens, "said": said}
