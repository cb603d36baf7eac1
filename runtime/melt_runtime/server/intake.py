"""Read and prepare requests, with limits on the bytes read and the work prepared at the same time."""

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
from .failures import ApiError, as_api_error, as_refusal
from .fields import Strict
from .guard import note
from .process import trim_memory

A = TypeVar("A", bound=Strict)
R = TypeVar("R")
BODY_SECONDS = 60.0  # for a body to arrive
MAX_UPLOADS = 64 << 20  # bytes of all incomplete bodies together
PROMPTS = {"prompt", "messages", "input", "instructions"}  # the fields that --log-prompts writes
_WORKERS = 2  # calls prepared at the same time
_LARGE = 1 << 16  # bytes above which bodies are prepared one by one and memory is trimmed


class Uploads:
    """Bodies being received, at most ``most`` bytes together. Beyond that, the largest is cut. For the event loop's
    thread."""

    def __init__(self, most: int = MAX_UPLOADS):
        self.most = most
        self._sizes: dict[asyncio.Timeout, int] = {}

    async def read(self, request: Request, limit: int) -> bytes:
        """Read a request's JSON body.

        Raises ApiError: 413 above ``limit`` bytes, 415 for another type, 408 if late or cut, 499 if the client left.
        """
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
                    async for part in request.stream():
                        body += part
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
    """Workers that prepare calls off the event loop, two at a time and only one of them large.

    Small calls and the scheduler's thread so get their turns. At most ``most`` calls wait. Raises BusyError for more.
    """

    def __init__(self, most: int):
        self.most, self._waiting = most, 0
        self._threads, self._large = ThreadPoolExecutor(_WORKERS, "melt-prepare"), asyncio.Lock()

    async def run(self, work: Callable[[], R], size: int = 0) -> R:
        """Return the result of ``work``. ``size``: bytes that it works on."""
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
                asyncio.get_running_loop().run_in_executor(self._threads, trim_memory)

    def close(self) -> None:
        """Stop the threads once they are done."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Intake:
    """From a request to what it asks for: reads the body, validates it, and prepares the call off the event loop.

    ``limit``: most bytes of a body. ``log_prompts``: write prompts into the log.
    """

    def __init__(self, preparation: Preparation, limit: int, log_prompts: bool):
        self._preparation, self._limit, self._log_prompts = preparation, limit, log_prompts
        self._uploads = Uploads()

    async def prepare(self, request: Request, kind: type[A], work: Callable[[A], R]) -> R:
        """Return what ``work`` makes of the body, an object of type ``kind``. Raises ApiError."""
        body = await self._uploads.read(request, self._limit)

        def prepared() -> R:
            call = parsed(kind, body)
            if self._log_prompts:
                note(request, **call.model_dump(include=PROMPTS))
            try:
                return work(call)
            except ValidationError as error:  # of a call that is made from this one
                raise as_refusal(error).renamed(call.own_field) from error
            except ApiError as error:
                raise error.renamed(call.own_field) from None
            except MeltError as error:
                raise as_api_error(error, call.prompt_field) from error

        return await self._preparation.run(prepared, len(body))


def _refused(work: Callable[[], R]) -> R | Exception:
    """Return the result or the error of ``work``; the error without its frames, which hold the body and all made of
    it."""
    try:
        return work()
    except (ApiError, MeltError) as error:
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return error


def parsed(kind: type[A], body: bytes) -> A:
    """Validate a body. Raises ApiError 400."""
    try:
        content = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="json_invalid") from error
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise as_refusal(error) from error
