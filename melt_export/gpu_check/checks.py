"""What must hold of a model on a target: parity, greedy tokens, flat memory, graphs that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from melt_runtime import LoopSettings, Runtime

from ..parity.expected import weigh_partings
from ..parity.report import TOLERANCES, ParityReport
from ..parity.verify import compare
from ..reference.pytorch import open_reference
from .machine import Machine
from .report import FAILED, PASSED, Result
from .subjects import Subject

LOOPS = (1, 4, 16)
_SLACK_BYTES = 8 << 20  # what a driver or an allocator may take in one piece, whatever the model
_SLACK_SHARE = 0.01  # of what a LoopLM's caches would grow by
Row = Callable[[str, str, str, dict[str, Any]], Result]


def row_of(subject: Subject, target: str) -> Row:
    """A maker of rows about a model on a target: check, state, detail, figures."""
    return lambda check, state, detail, figures: Result(subject.name, target, check, state, detail, figures)


def parity(runtime: Runtime, subject: Subject, row: Row) -> list[Result]:
    """Every loop's states and logits, exit depths, and greedy tokens, against PyTorch: two rows."""
    manifest = runtime.manifest
    tolerance = TOLERANCES[manifest.precision]
    report = ParityReport(manifest.precision, manifest.dialect, manifest.loops, runtime.backend.name, tolerance)
    compare(runtime, subject.expected, report)
    weigh_partings(report, subject.expected, lambda: open_reference(subject.checkpoint))
    failures = report.failures()
    greedy = [failure for failure in failures if failure.startswith("greedy")]
    rest = [failure for failure in failures if failure not in greedy]
    detail = (
        f"worst relative error {report.error()} over {report.loops} loops, "
        f"KL {report.kl_mean:.1e}, exit depths {report.exit_same_depth}/{report.exit_tokens}"
    )
    same, count = sum(run.same for run in report.generations), sum(run.tokens for run in report.generations)
    must = "must be all" if tolerance.same_tokens else f"in {manifest.precision} they may part"
    return [
        row("states and logits", FAILED if rest else PASSED, "; ".join(rest[:3]) or detail, asdict(report)),
        row(
            "greedy tokens",
            FAILED if greedy else PASSED,
            f"{same} of {count} the same as PyTorch's ({must})",
            {"same": same, "tokens": count},
        ),
    ]


def flat_memory(runtime: Runtime, machine: Machine, tokens: int, row: Row) -> Result:
    """Memory after generating with 1, 4 and 16 loops: what a LoopLM would add in caches must not be added."""
    driver = runtime.driver()
    prompt = np.arange(min(4, runtime.manifest.vocab_size))[None].tolist()

    def generate(loops: int) -> int:
        driver.reset()
        settings = LoopSettings(loops)
        logits = driver.append(prompt, settings)
        for _ in range(min(tokens, driver.capacity - len(prompt[0]))):
            logits = driver.append([[int(logits[0].argmax())]], settings)
        return machine.memory_used()

    generate(1)  # what is allocated at first use, at any depth
    used = {loops: generate(loops) for loops in LOOPS}
    grown = max(used.values()) - used[LOOPS[0]]
    caches = (LOOPS[-1] - 1) * runtime.manifest.cache_bytes(runtime.manifest.cache_rows)
    limit = int(max(_SLACK_SHARE * caches, _SLACK_BYTES))
    figures = {
        "used_bytes": used,
        "state_bytes": driver.state.state_bytes,
        "grown_bytes": grown,
        "limit_bytes": limit,
        "looplm_would_add_bytes": caches,
    }
    detail = (
        f"{grown / 1e6:+.1f} MB from 1 to 16 loops (limit {limit / 1e6:.1f} MB; a LoopLM's caches would add "
        f"{caches / 1e6:,.1f} MB); state {driver.state.state_bytes / 1e6:,.1f} MB"
    )
    return row("memory", PASSED if grown <= limit else FAILED, detail, figures)


def same_answers(first: Runtime, second: Runtime, tokens: int, row: Row) -> Result:
    """Two ways of running one package, such as with CUDA graphs and without: equal logits, bit for bit."""
    prompt = np.arange(2 * first.manifest.chunk // 3 + 1) % first.manifest.vocab_size
    drivers = [runtime.driver() for runtime in (first, second)]
    settings = LoopSettings(first.manifest.loops)
    pending, worst, steps = [prompt.tolist()], 0.0, 0
    for _ in range(min(tokens, drivers[0].capacity - len(prompt))):
        one, other = (driver.append(pending, settings) for driver in drivers)
        worst, steps = max(worst, float(np.abs(one - other).max())), steps + 1
        pending = [[int(one[0].argmax())]]
    equal = worst == 0.0
    detail = f"logits of {steps} steps {'equal bit for bit' if equal else f'differ by up to {worst:.1e}'}"
    return row("graphs against plain runs", PASSED if equal else FAILED, detail, {"largest_difference": worst})
