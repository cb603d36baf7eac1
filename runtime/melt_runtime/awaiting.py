"""Await work that blocks: on threads of its own, and ended early where the awaiting task is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


class Awaiting:
    """Two threads: one for whole calls, one after another, and one for the steps of iterators, in turns."""

    def __init__(self) -> None:
        self._calls = ThreadPoolExecutor(1, "melt-await")
        self._steps = ThreadPoolExecutor(1, "melt-steps")

    async def call(self, work: Callable[[threading.Event], T]) -> T:
        """Return what ``work`` returns. It is given an event that is set once nobody waits any longer."""
        left = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._calls, work, left)
        finally:
            left.set()

    async def iterate(self, items: Iterator[T]) -> AsyncGenerator[T, None]:
        """Yield the items of an iterator, whose steps block. Closes it at the end, or after the step that runs when the
        task is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while (item := await loop.run_in_executor(self._steps, next, items, _END)) is not _END:
                yield item  # type: ignore[misc]
        finally:
            self._steps.submit(getattr(items, "close", lambda: None))
