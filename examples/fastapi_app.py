"""Your own web application around the runtime: requests share slots, and answers are streamed.

    MELT_PACKAGE=PACKAGE uvicorn --app-dir examples fastapi_app:app
    curl -N localhost:8000/answers -H 'Content-Type: application/json' -d '{"prompt": "2+2=", "loops": 4}'

``melt-run serve`` has OpenAI's interface; start here for an interface of your own.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.requests import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from melt_runtime import BusyError, Generation, MeltError, Request, Runtime, Scheduler, TextDelta
from pydantic import BaseModel, Field

Events = asyncio.Queue[TextDelta | Generation | MeltError]


class Question(BaseModel):
    """Body of a request. ``loops`` None: the package's number."""

    prompt: str
    loops: int | None = Field(None, ge=1)
    max_tokens: int = Field(64, ge=1, le=1024)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the package at the start and free it at the end."""
    with Scheduler(Runtime.load(os.environ["MELT_PACKAGE"]), max_waiting=16) as scheduler:
        app.state.scheduler = scheduler
        yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(MeltError)
async def refused(request: HttpRequest, error: MeltError) -> Response:
    """Answer with the runtime's error, which is one sentence and fit for clients."""
    return JSONResponse({"error": str(error)}, 429 if isinstance(error, BusyError) else 400)


@app.post("/answers")
async def answer(question: Question) -> Response:
    """Stream JSON lines: {"text", "loops"} per token, then {"finish_reason"} or {"error"}."""
    scheduler: Scheduler = app.state.scheduler
    runtime, loop, events = scheduler.runtime, asyncio.get_running_loop(), Events()
    options = runtime.options(max_tokens=question.max_tokens, loops=question.loops)
    asked = Request(tuple(runtime.encode(question.prompt)), options)
    # The listener is called from the scheduler's thread and must not block.
    handle = scheduler.submit(asked, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))

    async def lines() -> AsyncIterator[str]:
        try:
            while isinstance(event := await events.get(), TextDelta):
                yield json.dumps({"text": event.text, "loops": event.depth}) + "\n"
            failed = isinstance(event, MeltError)
            yield json.dumps({"error": str(event)} if failed else {"finish_reason": event.finish_reason}) + "\n"
        finally:
            handle.cancel()  # frees the slot of a client that left; no effect on a finished answer

    return StreamingResponse(lines(), media_type="application/x-ndjson")
