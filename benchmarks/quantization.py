"""Cost of quantization: packages of one checkpoint with quantized weights and caches, measured on the same text.

    python benchmarks/quantization.py CHECKPOINT [TEXT] [--tokens 8192] [--json FILE] [--plot FILE] [--variant "..."]

A variant is a set of options of melt-export; by default the usual ones are measured. Every package is compared with the
checkpoint in float32, as melt-verify does, on more text. The default text is taken from the descriptions of the
installed packages that constraints.txt pins. The plot needs matplotlib.
"""

from __future__ import annotations

import math
import shlex
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from common import STYLE, command_line, machine, melt_export, save, versions
from melt_runtime import Runtime
from melt_runtime.package.reader import Package
from melt_runtime.progress import Step, shown_progress
from rich.console import Console
from templating import render

from melt_export.checkpoint import Checkpoint
from melt_export.parity.quality import held_out, measure, reference_logits
from melt_export.parity.report import Limits
from melt_export.reference.pytorch import reference_of

VARIANTS = (
    "--weights int4",
    "--weights int8",
    "--cache int8",
    "--weights int4 --int8-share 0",
    "--weights int4 --asymmetric",
    "--weights int4 --method rtn",
    "--weights int8 --method rtn",
    "--weights int4 --cache int8",
    "--cache int4",
)
# Upper limits for the growth of SmolLM2-135M's perplexity at one loop, in percent, by variant.
PROMISED = {"--weights int4": 5.0, "--weights int8": 0.5, "--cache int8": 0.5}
_ROWS = 1024
_CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
_SHORTEST, _LONGEST = 150, 1500  # characters of a paragraph, and of all text per package
_ONE_LINE = 0.1  # points whose logarithms are closer need names on different sides
_NOT_PROSE = ("http", "<", "|", "```", "::", ">>>", "- [", "{")


def descriptions() -> str:
    """Return the prose of the installed packages' descriptions, in constraints.txt's order."""
    found = []
    for line in _CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        name, pinned, _ = line.partition("==")
        try:
            about = metadata(name) if pinned else None
        except PackageNotFoundError:
            continue
        if about is not None:
            text = str(about.json.get("description", "")).replace("\r", "")
            joined = [" ".join(part.split()) for part in text.split("\n\n")]
            prose = [part for part in joined if len(part) >= _SHORTEST and not any(m in part for m in _NOT_PROSE)]
            found.append("\n\n".join(prose)[:_LONGEST])
    return "\n\n".join(part for part in found if part)


def run(
    checkpoint: Path, text: Path, tokens: int, variants: tuple[str, ...], directory: Path, step: Step
) -> Iterator[dict[str, Any]]:
    """Measure the variants and yield one row for each. Raises RuntimeError if melt-export fails."""
    held = expected = None
    for variant in variants:
        step(f"exporting {variant}", 0, 0)
        path = melt_export(checkpoint, directory / "package", _ROWS, "--force", *shlex.split(variant))
        package = Package.open(path, check_hashes=False)
        if held is None or expected is None:
            held = held_out(path, package.manifest, text, tokens)
            expected = reference_logits(reference_of(Checkpoint(checkpoint).load()), held, package.manifest)
        runtime = Runtime.load(path, backend="onnxruntime", check_hashes=False)
        found = measure(runtime, held, expected, package.manifest.loops, Limits(), step)
        yield {
            "variant": variant,
            "bytes": package.manifest.weights_bytes,
            "cache_bytes_a_token": package.manifest.cache_bytes(1),
            "positions": found.positions,
            "kl": found.kl,
            "top1": found.top1,
            "perplexity": found.perplexity,
            "checkpoint_perplexity": found.checkpoint_perplexity,
            "perplexity_change_percent": found.perplexity_change,
        }


def broken(rows: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each variant that exceeds its limit."""
    return [
        f"{row['variant']}: perplexity {row['perplexity_change_percent']:+.2f}%, promised +{limit:g}% at most"
        for row in rows
        if (limit := PROMISED.get(row["variant"])) is not None and not row["perplexity_change_percent"] <= limit
    ]


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot quality against the bytes of weights and 1,024 tokens of cache."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
        sizes = [(row["bytes"] + _ROWS * row["cache_bytes_a_token"]) / 1e6 for row in rows]
        for row, size in zip(rows, sizes, strict=True):
            beside = any(
                size < x < 1.5 * size and abs(math.log(other["kl"] / row["kl"])) < _ONE_LINE
                for other, x in zip(rows, sizes, strict=True)
            )
            axes.plot(size, row["kl"], "o", color="#0b6bcb")
            axes.annotate(
                row["variant"].replace("--", ""),
                (size, row["kl"]),
                textcoords="offset points",
                xytext=(-6, 4) if beside else (6, 4),
                ha="right" if beside else "left",
                fontsize=8,
            )
        axes.set(yscale="log", xlabel=f"weights and {_ROWS:,} tokens of cache, MB", ylabel="KL divergence, nats")
        axes.margins(y=0.15)
        axes.set_xlim(0, 1.25 * max(sizes))
        axes.set_title("Cost of quantization")
        figure.savefig(file, dpi=150)
        plt.close(figure)


def main(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="With a tokenizer.")],
    text: Annotated[
        Path | None,
        typer.Argument(
            exists=True, dir_okay=False, help="UTF-8, that nothing was calibrated on. Default: packages' descriptions."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of the text that are measured on, at most.", min=2)] = 8192,
    variant: Annotated[list[str] | None, typer.Option(help="What melt-export would be given; may be repeated.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the section 'quantization' of this file.")
    ] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw quality against bytes into this PNG.")] = None,
) -> None:
    """Measure what fewer bits cost. Exit code 1 where it is more than is promised, which is of SmolLM2-135M."""
    rows: list[dict[str, Any]] = []
    report = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command_line("quantization.py", sys.argv[1:]),
        "machine": machine(),
        "versions": versions("torch", "onnxruntime", "transformers"),
        "rows": rows,
    }
    with shown_progress() as step, tempfile.TemporaryDirectory(prefix="melt-quantization-") as name:
        directory = Path(name)
        if text is None:
            text = directory / "descriptions"
            text.write_text(descriptions(), encoding="utf-8")
        for row in run(checkpoint, text, tokens, tuple(variant or VARIANTS), directory, step):
            rows.append(row)
            if json_file is not None:
                save(json_file, "quantization", report)
    if plot_file is not None:
        plot(rows, plot_file)
    Console(soft_wrap=True).print(render("quantization_table.md.j2", rows=rows), markup=False, highlight=False)
    if failures := broken(rows):
        print("\n".join(failures), file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
