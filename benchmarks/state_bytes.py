"""State of published looped models by number of loops, with a cache per loop and with shared caches.

    python benchmarks/state_bytes.py [--tokens 4096] [--precision fp16] [--picture docs/state.png]

Prints a table for the docs, and draws it. The bytes are those that a session of one sequence allocates; no weights are
needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from common import STYLE
from melt_models.checkpoint import CONFIGS
from melt_models.configuration import LoopedConfig
from melt_models.convert import melt_config
from melt_runtime.package.specs import CODA, PRECISIONS
from random_checkpoint import PUBLISHED
from rich.filesize import decimal

from melt_export.graph.dialects import DIALECTS
from melt_export.graph.trace import loop_states

LOOPS = (1, 4, 16, 32)
_CHUNK = 128


def state_bytes(config: LoopedConfig, tokens: int, precision: str) -> int:
    """Return the bytes of a package's state for one sequence of so many tokens, in chunks of 128."""
    dialect, dtype = DIALECTS["onnxruntime"], PRECISIONS[precision]
    states = loop_states(config, dialect, dtype, tokens)
    for stage in ("prelude", CODA):
        states += dialect.stage_states(config, stage, dtype, tokens)
    return sum(state.bytes(1, _CHUNK) for state in states)


def rows(tokens: int, precision: str) -> dict[str, tuple[list[int], list[int]]]:
    """Return bytes by LOOPS, with a cache per loop and shared, for each published model."""
    found = {}
    for name, content in PUBLISHED.items():
        own, shared = [], []
        for loops in LOOPS:
            config = CONFIGS[content["model_type"]].from_dict(content)
            config.total_ut_steps = loops
            own.append(state_bytes(config, tokens, precision))
            shared.append(state_bytes(melt_config(config, aggregation="last"), tokens, precision))
        found[name] = (own, shared)
    return found


def draw(found: dict[str, tuple[list[int], list[int]]], tokens: int, precision: str, path: Path) -> None:
    """Draw the bytes by loops: a line per model and kind of caches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
        for (name, pair), color in zip(found.items(), ("#0b6bcb", "#d1700f"), strict=True):
            for sizes, how, style in zip(pair, ("a cache per loop", "shared caches"), ("--", "-"), strict=True):
                axes.plot(LOOPS, [size / 1e9 for size in sizes], style, color=color, label=f"{name}, {how}", marker="o")
        axes.set(xlabel="loops", xticks=LOOPS, ylim=0)
        axes.set_title(f"state of one sequence of {tokens:,} tokens, {precision} (GB)", loc="left")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def main(
    tokens: Annotated[int, typer.Option(help="Tokens that the caches hold.", min=1)] = 4096,
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "fp16",
    picture: Annotated[Path | None, typer.Option(help="Draw it, too.")] = None,
) -> None:
    """Print the table."""
    found = rows(tokens, precision)
    if picture is not None:
        draw(found, tokens, precision, picture)
    print(
        f"| {tokens:,} tokens, {precision} | "
        + " | ".join(f"{loops} {'loop' if loops == 1 else 'loops'}" for loops in LOOPS)
        + " |"
    )
    print("|---|" + "---|" * len(LOOPS))
    for name, pair in found.items():
        for how, sizes in zip(("a cache per loop", "shared caches"), pair, strict=True):
            print(f"| {name}, {how} | " + " | ".join(decimal(size) for size in sizes) + " |")


if __name__ == "__main__":
    typer.run(main)
