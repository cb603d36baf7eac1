"""Settings of compare.py, and what its sections share: packages in the 1.4B shape, with random weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import melt_export
from melt_models import LoopLMConfig, MeltConfig
from melt_runtime.progress import Step
from random_checkpoint import SHAPES, make, resized


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    - ``contexts``: tokens in the cache before the timed ones; ``eager_contexts``: those at which PyTorch runs too.
    - ``buffers``: tokens that the compared caches hold; the first is also that of ``decode`` and ``loops``.
    - ``long_rows``: tokens of ``long``.
    - ``prompts``: tokens of SmolLM2's timed prompt, for each of ``eager_contexts``.
    - ``busy``: numbers of busy processes beside SmolLM2, in turn.
    - ``loss_tokens``: tokens of text on which the loss of SmolLM2's 4 bits is measured.
    - ``smollm2``: a SmolLM2 checkpoint, made if None.
    - ``export``: options of melt-export.
    """

    hidden: int = 2048
    layers: int = 24
    vocabulary: int = 49152
    loops: int = 4
    threads: int = 2
    contexts: tuple[int, ...] = (10, 128, 256, 512, 1000)
    eager_contexts: tuple[int, ...] = (10, 512)
    buffers: tuple[int, int] = (1024, 32768)
    long_rows: int = 32000
    rounds: int = 7
    tokens: int = 3
    prompt: int = 128
    prompts: tuple[int, ...] = (128, 512)
    busy: tuple[int, ...] = (1,)
    loss_tokens: int = 4096
    smollm2: Path | None = None
    export: tuple[str, ...] = ("--weights", "int4", "--method", "rtn")

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """Numbers of threads to try: 1, 2, 4 and so on up to ``threads``."""
        powers = {2**exponent for exponent in range(self.threads.bit_length())}
        return tuple(sorted({*powers, self.threads}))

    @property
    def rows(self) -> int:
        """Tokens that the cache of the decoding packages holds."""
        return self.buffers[0]


QUICK: dict[str, Any] = {
    "hidden": 256,
    "layers": 1,
    "vocabulary": 1024,
    "loops": 2,
    "contexts": (10, 100),
    "eager_contexts": (10,),
    "buffers": (256, 1024),
    "long_rows": 512,
    "rounds": 2,
    "tokens": 1,
    "prompt": 16,
    "prompts": (16,),
    "loss_tokens": 64,
}


def checkpoint(directory: Path, settings: Settings, kind: str) -> Path:
    """Make a random checkpoint in the shape, "melt" or "looplm", unless it exists."""
    path = directory / f"{kind}-checkpoint"
    if not path.is_dir():
        shape = resized(
            SHAPES["ouro-1.4b"],
            layers=settings.layers,
            hidden=settings.hidden,
            vocabulary=settings.vocabulary,
            loops=settings.loops,
        )
        for name in ("chunk_size", "latent_init", "aggregation", "ema_weight", "untrained", "model_type"):
            if kind == "looplm" or name == "model_type":
                shape.pop(name, None)
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):  # it has a progress bar
            make(path, (MeltConfig if kind == "melt" else LoopLMConfig)(**shape))
    return path


def export(source: Path, output: Path, rows: int, settings: Settings, *more: str) -> Path:
    """Export a package unless it exists. ``more``: options beside the settings'. Raises RuntimeError."""
    return output if output.is_dir() else melt_export(source, output, rows, *settings.export, *more)


def melt(directory: Path, settings: Settings, step: Step, rows: int, *more: str) -> Path:
    """Export the MELT with a cache of ``rows`` tokens. ``more``: options, with which the package's name ends."""
    step(f"exporting MELT, {' '.join((f'{rows:,} rows', *more))}", 0, 0)
    name = "-".join(("melt", str(rows), *(option.strip("-") for option in more)))
    return export(checkpoint(directory, settings, "melt"), directory / name, rows, settings, *more)


def counting(step: Step, name: str, total: int) -> Callable[[], None]:
    """Announce a step of ``total`` parts; return the function that counts one of them."""
    step(name, total, 0)
    return lambda: step(name, total, 1)
