"""Bodies on their way in, and from a body to a job: so many bytes at once, and so many at once in preparation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from ..errors import BusyError, MeltError
from .failures import ApiError, as_refusal
from .process import give_back
from .schema import Ask

A = TypeVar("A", bound=Ask)
R = TypeVar("R")
BODY_SECONDS = 60.0  # how long a body may take to arrive
MAX_UPLOADS = 64 << 20  # bytes of bodies that have not arrived whole, all together
_AT_ONCE = 2  # calls that are prepared at once
_LARGE = 1 << 16  # bytes of a body that waits for others of its size, and after which memory is given back


class Uploads:
    """Bodies that have not arrived whole: at most ``most`` bytes together. When there are more, the one that has the
    most is cut. For the event loop's thread."""

    def __init__(self, most: int = MAX_UPLOADS):
        self.most = most
        self._sizes: dict[asyncio.Timeout, int] = {}

    async def read(self, request: Request, limit: int) -> bytes:
        """The JSON that came with a request. Raises ApiError: 413 over ``limit`` bytes, 415 for another type, 408 for
        one that is late or was cut, 499 if the client left."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the body's type is {kind[:100]!r}; it must be application/json")
        too_large = ApiError(413, f"the body is larger than {limit:,} bytes", code="body_too_large")
        too_large.headers["Connection"] = "close"
        length = request.headers.get("content-length", "0")
        if not (length.isdecimal() and len(length) < 20) or int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS) as time:
                try:
                    async for piece in request.stream():
                        body += piece
                        if len(body) > limit:
                            raise too_large
                        self._has(time, len(body))
                finally:
                    self._sizes.pop(time, None)
        except TimeoutError as error:
            late = ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} seconds, or too many came at once")
            late.headers["Connection"] = "close"
            raise late from error
        except ClientDisconnect as error:
            raise ApiError(499, "the client left before its body had come", code="left") from error
        return bytes(body)

    def _has(self, time: asyncio.Timeout, size: int) -> None:
        self._sizes[time] = size
        if sum(self._sizes.values()) > self.most:
            largest = max(self._sizes, key=lambda one: self._sizes[one])
            del self._sizes[largest]
            largest.reschedule(asyncio.get_running_loop().time())


class Preparation:
    """Where calls are made ready to run, off the event loop: two at once, of which one may be large, so that small ones
    and the scheduler's thread always have their turn; ``most`` may wait for theirs. Raises BusyError for one more."""

    def __init__(self, most: int):
        self.most, self._waiting = most, 0
        self._threads, self._large = ThreadPoolExecutor(_AT_ONCE, "melt-prepare"), asyncio.Lock()

    async def run(self, work: Callable[[], R], size: int = 0) -> R:
        """What ``work`` gives. size: bytes of what it works on."""
        if self._waiting >= self.most:
            raise BusyError(f"{self._waiting} calls wait to be prepared; try again in a second", 1.0)
        self._waiting += 1
        try:
            async with self._large if size > _LARGE else nullcontext():
                found = await asyncio.get_running_loop().run_in_executor(self._threads, _refused, work)
            if isinstance(found, Exception):
                raise found
            return found
        finally:
            self._waiting -= 1
            if size > _LARGE:
                asyncio.get_running_loop().run_in_executor(self._threads, give_back)

    def close(self) -> None:
        """Ends its threads, once they are done."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _refused(work: Callable[[], R]) -> R | Exception:
    """What ``work`` gives or refuses; a refusal alone, without the frames that hold the body and all that was made of
    it."""
    try:
        return work()
    except (ApiError, MeltError) as error:
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return error


def parsed(kind: type[A], body: bytes) -> A:
    """What a body asks for. Raises ApiError 400."""
    try:
        content = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="json_invalid") from error
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise as_refusal(error) from error
