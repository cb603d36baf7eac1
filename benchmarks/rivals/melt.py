"""A package, run as generation runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rivals.turns import Sample


def run(directory: Path, threads: int | None, loops: int, context: int, tokens: int, prompt: int) -> Iterator[Sample]:
    """Run a package. ``threads``: None for as many as the runtime chooses."""
    from melt_runtime import Runtime
    from melt_runtime.bench.stopwatch import Stopwatch, settle

    runtime = Runtime.load(directory, threads=threads, check_hashes=False)
    watch = Stopwatch(runtime.driver())
    while True:
        if threads is None:
            settle([watch], context)
        token, loop = watch.decode(context, loops, tokens)
        sample = {"token_s": token, "loop_s": loop}
        if prompt:
            sample["prefill_s"] = watch.prefill(prompt, runtime.manifest.chunk, loops)
        yield sample


def in_small_pages(*arguments: Any) -> Iterator[Sample]:
    """Run a package whose memory stays in the pages in which it was allocated; ``arguments`` as for ``run``."""
    from melt_runtime.backends.large_pages import NewMemory

    NewMemory.in_large_pages = lambda memory: None  # type: ignore[method-assign]
    yield from run(*arguments)
