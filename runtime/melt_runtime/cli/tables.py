"""Format results: the tables of ``melt-run inspect``, statistics of a generation, progress of opening a package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..package.engine_spec import EngineSpec, devices_of
from ..progress import shown_progress
from ..results import Generation
from ..text.end_tokens import EndToken
from ..untrusted import printable
from .inspect import MemoryFacts, PackageFacts, StateFacts

# Hashing less than this is over before progress is noticed.
_PROGRESS_FROM_BYTES = 200_000_000


@contextmanager
def hash_progress(directory: Path) -> Iterator[Callable[[int], None] | None]:
    """Yield a callback for the ``progress`` of opening a package, which shows it on standard error; None for a small
    package."""
    total = sum(file.stat().st_size for file in directory.glob("*") if file.is_file())
    if total <= _PROGRESS_FROM_BYTES:
        yield None
        return
    with shown_progress(transient=True) as step:
        yield lambda count: step("checking the package", total, count)


def generation_dict(result: Generation) -> dict[str, Any]:
    """Return a generation as plain values for JSON.

    ``depth``: all depths, with their number, mean, minimum and maximum. ``saved``: the share of loops that early exit
    saved.
    """
    depth = result.depth
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "depth": {
            "tokens": len(depth),
            "mean": sum(depth) / len(depth),
            "min": min(depth),
            "max": max(depth),
            "each": list(depth),
        },
        "saved": result.saved,
        "pipeline": None if result.pipeline is None else asdict(result.pipeline),
    }


def stats_lines(result: Generation, started: float, arrivals: Sequence[float], state_bytes: int) -> list[str]:
    """Format speed, depth and memory of a generation. ``started``, ``arrivals``: when it began and each token came, in
    seconds."""
    decoding = arrivals[-1] - arrivals[0]
    speed = f"{(len(arrivals) - 1) / decoding:.1f} tokens/s" if decoding > 0 else "one token, no rate"
    use = result.pipeline
    drafts = "" if use is None else f", {sum(use.held)} of {sum(use.held) + sum(use.dropped)} drafts held"
    piped = [] if use is None else [f"pipelined            {use.runs_per_token:.2f} runs per token{drafts}"]
    return [
        f"decode               {speed}",
        f"time to first token  {arrivals[0] - started:.3f} s for {result.prompt_tokens} prompt tokens",
        f"mean loops           {sum(result.depth) / len(result.depth):.2f} per token, {result.saved:.0%} saved",
        *piped,
        f"state                {state_bytes:,} bytes",
    ]


def engine_line(spec: EngineSpec) -> str:
    """Describe an engine in a line: library, devices, bytes and largest sizes."""
    last = spec.profiles[-1]
    return (
        f"{spec.flavour} {spec.version}, compute capability {devices_of(spec)}, "
        f"batch {last.batch[2]}, chunk {last.chunk[2]}, {decimal(spec.bytes)}"
    )


def print_facts(facts: PackageFacts) -> None:
    """Print a package's facts as a panel and tables."""
    console = Console(highlight=False, markup=False)  # texts of a package may look like markup
    console.print(_summary(facts))
    for warning in facts.warnings:
        console.print(Text(f"Warning: {warning}", style="bold yellow"))
    engines = [_engines(facts)] if facts.engines else []
    for table in (
        _files(facts),
        *engines,
        _states(facts),
        _memory(facts.memory),
        *([] if facts.memory.most_loops == 1 else [_comparison(facts.memory)]),
        _backends(facts),
    ):
        console.print()
        console.print(table)


def _summary(facts: PackageFacts) -> Panel:
    early = "no token leaves early" if facts.exit_threshold >= 1 else "of the cumulative exit probability"
    text = (
        "tokenizer and chat template" if facts.chat_template else "tokenizer" if facts.tokenizer else "token ids only"
    )
    shape = f"{_known(facts.layers)} layers, d {_known(facts.hidden_size)}, {_known(facts.heads)} heads"
    rows = {
        "model": f"{shape}, {_known(facts.kv_heads)} key/value heads, vocabulary {facts.vocab_size:,}",
        "loops": f"{facts.loops} per token, exit threshold {facts.exit_threshold:g} ({early})",
        **({"stages": facts.stages} if facts.stages else {}),
        **({"exit auto": facts.exit} if facts.exit else {}),
        **({"shared caches": facts.shared_caches} if facts.shared_caches else {}),
        "graphs": f"{facts.dialect} dialect, {facts.precision}",
        "arithmetic": facts.arithmetic,
        "limits": f"{facts.max_seq_len:,} tokens, batch {facts.max_batch}, chunk {facts.chunk}",
        "prompts": text if facts.example_prompt is None else f"{text}, for example {facts.example_prompt!r}",
        "stops at": ", ".join(map(_end_token, facts.end_tokens)) or "no token",
        "parity": "not verified (no parity.json)" if facts.parity is None else facts.parity.verdict,
        "hash": facts.hash,
    }
    if facts.parity is not None and facts.parity.current and facts.parity.staggered is not None:
        rows["staggered decoding"] = facts.parity.staggered.summary()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column()
    for label, value in rows.items():
        grid.add_row(label, Text(value))
    title = Text(printable(Path(facts.directory).resolve().name or facts.directory), style="bold")
    return Panel(grid, title=title, title_align="left", expand=False)


def _end_token(token: EndToken) -> str:
    text = "" if token.text is None else f" {token.text!r}"
    return f"{token.id}{text} ({' and '.join(token.sources)}{'; in chats' if token.chats_only else ''})"


def _known(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _table(title: str, *columns: tuple[str, str]) -> Table:
    """Make a table with (heading, justification) columns."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, header_style="cyan")
    for heading, justify in columns:
        table.add_column(heading, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def _files(facts: PackageFacts) -> Table:
    table = _table("Graphs and files", ("file", "left"), ("role", "left"), ("size", "right"))
    names = {graph.file: f"graph {graph.name}" for graph in facts.graphs}
    for file in facts.files:
        table.add_row(Text(file.name), names.get(file.name, file.role), decimal(file.bytes))
    table.add_section()
    table.add_row("total", "", decimal(sum(file.bytes for file in facts.files)), style="bold")
    return table


def _engines(facts: PackageFacts) -> Table:
    columns = (("engine", "left"), ("built with", "left"), ("for", "left"), ("weights", "left"), ("size", "right"))
    table = _table("Engines", *columns)
    for name, spec in facts.engines.items():
        devices = devices_of(spec)
        built = f"{spec.flavour} {spec.version}"
        table.add_row(Text(name), built, devices, spec.weights or spec.precision, decimal(spec.bytes))
    return table


def _backends(facts: PackageFacts) -> Table:
    table = _table("Backends, here", ("backend", "left"), ("runs", "left"), ("why", "left"))
    for backend in facts.backends:
        shown = Text("yes", style="green") if backend.usable else Text("no", style="dim")
        table.add_row(Text(backend.name), shown, Text(backend.reason))
    return table


def _states(facts: PackageFacts) -> Table:
    columns = (("state", "left"), ("kind", "left"), ("dtype", "left"), ("shape", "left"), ("allocated", "right"))
    table = _table("States of the loop step", *columns)

    def alike(state: StateFacts) -> tuple[str, str, str, tuple[int | str, ...]]:
        return (state.name.split(".")[0], state.kind, state.dtype, state.shape)

    # Caches of all layers have one shape: show them in one row, in order of first appearance.
    order = {alike(state): number for number, state in reversed(list(enumerate(facts.states)))}
    ordered = sorted(facts.states, key=lambda state: order[alike(state)])
    for (name, kind, dtype, shape), members in groupby(ordered, alike):
        group = list(members)
        label = group[0].name if len(group) == 1 else f"{group[0].name}..{group[-1].name.removeprefix(name + '.')}"
        dims = "×".join(str(dim) for dim in shape)
        table.add_row(Text(label), kind, dtype, dims, decimal(sum(state.bytes for state in group)))
    return table


def _memory(memory: MemoryFacts) -> Table:
    table = _table(f"Memory{_at(memory)}", ("what", "left"), ("bytes", "right"), ("", "right"), ("", "left"))
    most = memory.most_loops
    depth = "the same at any number of loops" if most is None else "for one loop" if most == 1 else f"for {most} loops"
    rows = (
        ("weights", memory.weights_bytes, "as stored"),
        ("state, allocated", memory.state_bytes, depth),
        ("cache, in use", memory.cache_bytes, "part of the state"),
    )
    for label, count, note in rows:
        table.add_row(label, f"{count:,}", decimal(count), Text(note, style="dim"))
    return table


def _comparison(memory: MemoryFacts) -> Table:
    columns = (("loops", "right"), ("MELT", "right"), ("LoopLM, one cache per loop", "right"))
    table = _table(f"Cache by loops{_at(memory)}", *columns)
    shared = memory.looplm_cache_bytes[1]
    for loops, count in memory.looplm_cache_bytes.items():
        table.add_row(str(loops), Text(decimal(shared), style="green"), decimal(count))
    return table


def _at(memory: MemoryFacts) -> str:
    return f" at {memory.length:,} tokens" + (f" × {memory.batch} sequences" if memory.batch > 1 else "")
