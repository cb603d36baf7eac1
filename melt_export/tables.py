"""The tables that ``melt-export`` and ``melt-verify`` print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from melt_runtime.package.manifest import Manifest
from melt_runtime.package.manifest_facts import arithmetic_of, exit_of, sharing_of, unread_parts
from rich.filesize import decimal
from rich.table import Table

if TYPE_CHECKING:
    from .parity.report import ParityReport
    from .plan import Plan


def package_table(output: Path, manifest: Manifest, report: ParityReport | None) -> Table:
    """Describe a finished package."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("package", str(output))
    table.add_row("dialect, precision", f"{manifest.dialect}, {manifest.precision}")
    table.add_row("graphs and weights", decimal(manifest.weights_bytes, precision=2))
    if manifest.weights:
        raised = len(manifest.weights.get("raised", ()))
        line = "{kind} in blocks of {block} ({method}), head {head}".format(**manifest.weights)
        line += f", embedding {manifest.weights.get('embedding', 'float16')}"
        table.add_row("weights", f"{line}, {raised} more in int8" if raised else line)
        table.add_row("arithmetic", arithmetic_of(manifest))

    if manifest.cache:
        table.add_row("cache", "{kind}, one scale per channel".format(**manifest.cache))
    most = manifest.most_loops
    depth = "any loops" if most is None else "one loop" if most == 1 else f"caches for {most} loops"
    table.add_row(
        "state, one sequence",
        f"{decimal(manifest.state_bytes(), precision=2)} at {manifest.max_seq_len} tokens, {depth}",
    )
    if "tokenizer.json" not in manifest.files:
        table.add_row("prompts", "token ids only: the checkpoint has no tokenizer.json")
    if manifest.exit:
        table.add_row("exit auto", exit_of(manifest))
    if manifest.shared_caches:
        table.add_row("shared caches", sharing_of(manifest))
    table.add_row("loops, chunk", f"{manifest.loops}, {manifest.chunk}")
    if manifest.untrained:
        unread = set(manifest.untrained) <= set(unread_parts(manifest.model, manifest.loops))
        how_read = "never read in one loop" if unread else "initialised by a conversion, never trained"
        table.add_row("untrained", f"{', '.join(manifest.untrained)}: {how_read}")
    table.add_row("parity", "not verified" if report is None else report.summary())
    if report is not None and manifest.weights:
        table.add_row("parity compared", report.arithmetic)
    if report is not None and report.quality is not None:
        table.add_row("quality", report.quality.summary())
    if report is not None and report.staggered is not None:
        table.add_row("staggered decoding", report.staggered.summary())
    return table


def parity_table(report: ParityReport) -> Table:
    """Show the errors of every quantity at every loop."""
    loops = range(1, report.loops + 1)
    table = Table(
        "relative error" + (" to float64" if any(s.own for s in report.states) else ""),
        *(f"loop {loop}" for loop in loops),
    )
    found = {(s.quantity, s.loop): s for s in report.states}
    for quantity in dict.fromkeys(s.quantity for s in report.states):
        errors = [found.get((quantity, loop)) for loop in loops]
        table.add_row(quantity, *("" if error is None else f"{error.relative:.1e}" for error in errors))
        if any(error is not None and error.own for error in errors):
            shown = ("" if error is None else f"{error.own:.1e}" for error in errors)
            table.add_row("  of PyTorch's float32", *shown)
    return table


def plan_tables(plan: Plan, output: Path) -> Iterator[Table]:
    """Describe what an export would do: what it writes, needs and compares, and the state by length and batch."""
    manifest = plan.manifest
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("would write", str(output))
    for name, size in plan.files.items():
        about = "about " if name.endswith(".onnx") else ""
        facts.add_row("", name if size is None else f"{name}, {about}{decimal(size, precision=2)}")
    facts.add_row("dialect, precision", f"{manifest.dialect}, {manifest.precision}")
    facts.add_row("loops, chunk", f"{manifest.loops}, {manifest.chunk}")
    facts.add_row("disk, about", f"{decimal(plan.disk_bytes)} of {decimal(plan.free_bytes)} free")
    facts.add_row("peak memory, about", decimal(plan.peak_bytes))
    facts.add_row("time, about", f"{_duration(plan.seconds)} on this machine if it is quiet, roughly")
    for phase in plan.phases:
        facts.add_row("", f"{phase.name}: {_duration(phase.seconds)}, {decimal(phase.peak_bytes)}")
    for number, sentence in enumerate(plan.compared):
        facts.add_row("" if number else "would compare", sentence)
    if not plan.compared:
        facts.add_row("would compare", "nothing")
    yield facts
    batches = sorted({1, min(4, manifest.max_batch), manifest.max_batch})
    state = Table("state, by tokens", *(f"batch {batch}" for batch in batches))
    most = manifest.max_seq_len
    for tokens in sorted({max(most // 16, 1), max(most // 4, 1), most}):
        sizes = (decimal(plan.state_bytes(tokens, batch), precision=2) for batch in batches)
        state.add_row(f"{tokens:,}", *sizes)
    yield state


def _duration(seconds: float) -> str:
    """Format seconds in a unit that a person would say."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
