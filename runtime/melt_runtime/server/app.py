"""The application and its routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from time import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ..errors import MeltError
from ..results import Generation, TextDelta
from .failures import ApiError, as_api_error
from .guard import Guard, Keys, note, request_id
from .intake import Preparation, Uploads, parsed
from .metrics import CONTENT_TYPE, prometheus
from .process import trim_memory
from .replies import ReplyFormat, StreamedChoice, usage
from .schema import ChatBody, CompletionBody
from .service import Job, Service
from .streaming import EventStream, Feed

# The page may connect to this server only, and must not be framed.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TRIM_SECONDS = 30.0


@dataclass(frozen=True)
class Limits:
    """Limits on requests: body size, API keys, local hosts only (see Guard), and whether prompts are logged."""

    max_body: int = 1 << 20
    keys: Keys = field(default_factory=Keys)
    local: bool = False
    log_prompts: bool = False


def build_app(service: Service, limits: Limits) -> FastAPI:
    """Build the application around a service, whose scheduler it closes at its end."""
    uploads = Uploads()
    preparation = Preparation(service.scheduler.slots + service.scheduler.max_waiting)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=_lifespan(service, preparation))
    app.add_middleware(Guard, keys=limits.keys, local=limits.local)
    _add_failures(app)
    _add_facts(app, service)

    async def ready(request: Request, kind: type[CompletionBody | ChatBody]) -> tuple[CompletionBody | ChatBody, Job]:
        body = await uploads.read(request, limits.max_body)

        def prepare() -> tuple[CompletionBody | ChatBody, Job]:
            call = parsed(kind, body)
            if limits.log_prompts:
                note(request, **call.model_dump(include={"prompt", "messages"}))
            return call, service.job(call)

        return await preparation.run(prepare, len(body))

    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, *await ready(request, CompletionBody))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, request, *await ready(request, ChatBody))

    return app


def _lifespan(service: Service, preparation: Preparation) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        trimming = asyncio.create_task(_trim())
        yield
        trimming.cancel()
        preparation.close()
        await run_in_threadpool(service.scheduler.close, drain=False)

    return lifespan


async def _trim() -> None:
    """Return freed memory to the system at intervals, so that a burst of requests does not keep it."""
    while True:
        await asyncio.sleep(_TRIM_SECONDS)
        await run_in_threadpool(trim_memory)


def _add_failures(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(MeltError)
    async def failed(request: Request, error: MeltError) -> Response:
        return as_api_error(error).response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        refusal = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        refusal.headers.update(error.headers or {})
        return refusal.response()

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log says how").response()


def _add_facts(app: FastAPI, service: Service) -> None:
    manifest, scheduler = service.runtime.manifest, service.scheduler
    model = {
        "id": service.name,
        "object": "model",
        "created": int(time()),
        "owned_by": "melt",
        "loops": manifest.loops,
        "exit_threshold": manifest.exit_threshold,
        "max_seq_len": manifest.max_seq_len,
        "max_tokens": service.max_tokens,
        "max_seconds": service.max_seconds,
        "max_loops": service.max_loops,
        "chat": service.runtime.tokenizer is not None and service.runtime.tokenizer.has_chat_template,
        "example_prompt": service.runtime.example_prompt,
    }

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        if not scheduler.open:
            return ApiError(503, "the scheduler takes no more requests", code="closed").response()
        if (stalled := scheduler.stalled) > service.stalled:
            return ApiError(503, f"the scheduler has not moved for {stalled:.0f} seconds", code="stuck").response()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(prometheus(scheduler.metrics(), service.backlog.unread), media_type=CONTENT_TYPE)

    @app.get("/v1/state")
    async def state() -> Response:
        now = scheduler.metrics()
        facts = {name: getattr(now, name) for name in ("state_bytes", "slots", "running", "waiting", "weights_bytes")}
        return JSONResponse(facts)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(model)


async def _answer(service: Service, request: Request, call: CompletionBody | ChatBody, job: Job) -> Response:
    chat = isinstance(call, ChatBody)
    reply_format = ReplyFormat(chat, request_id(request), service.name, service.fingerprint, service.runtime.tokenizer)
    feed = Feed(service.scheduler, job.requests, service.backlog)
    note(request, choices=len(job.requests), prompt_tokens=job.prompt_tokens, stream=bool(call.stream))
    if call.stream:
        return EventStream(
            feed, lambda send_event: _stream(request, reply_format, feed, job, call.usage_in_stream, send_event)
        )
    deltas: list[list[TextDelta]] = [[] for _ in job.requests]
    ends: dict[int, Generation] = {}
    async with feed.for_client(request.receive):
        async for index, event in feed:
            if isinstance(event, TextDelta):
                deltas[index].append(event)
            else:
                ends[index] = _ended(event)
    generated = _log_tokens(request, [delta for one in deltas for delta in one], ends)
    choices = [reply_format.whole(index, one, ends[index]) for index, one in enumerate(deltas)]
    counts = usage(job.prompt_tokens, generated, job.cached_tokens(ends))
    return JSONResponse(reply_format.frame(choices, part=False, usage=counts))


async def _stream(
    request: Request,
    reply_format: ReplyFormat,
    feed: Feed,
    job: Job,
    counted: bool,
    send_event: Callable[[Any], Awaitable[None]],
) -> None:
    """Send each token as an event as it comes. An error that ends the stream early is sent instead of [DONE]."""
    choices = [StreamedChoice(reply_format, index) for index in range(len(job.requests))]
    last: dict[int, TextDelta] = {}  # sent with the end, which follows at once
    deltas: list[TextDelta] = []
    ends: dict[int, Generation] = {}
    blank = {"usage": None} if counted else {}
    try:
        async for index, event in feed:
            if isinstance(event, TextDelta):
                deltas.append(event)
                if event.finish_reason is not None:
                    last[index] = event
                    continue
                part = choices[index].part(event)
            else:
                ends[index] = _ended(event)
                part = choices[index].part(last.get(index), ends[index])
            await send_event(reply_format.frame([part], part=True, **blank))
    except (MeltError, ApiError) as error:
        note(request, error=str(error))
        await send_event((as_api_error(error) if isinstance(error, MeltError) else error).body())
        return
    finally:
        generated = _log_tokens(request, deltas, ends)
    if counted:
        counts = usage(job.prompt_tokens, generated, job.cached_tokens(ends))
        await send_event(reply_format.frame([], part=True, usage=counts))
    await send_event("[DONE]")


def _ended(event: Generation | MeltError) -> Generation:
    """Return a request's Generation. Raises the error that ended it before any output, or ApiError if it was
    cancelled."""
    if isinstance(event, MeltError):
        raise event
    if event.finish_reason == "cancelled":
        raise ApiError(503, "the request was cancelled: its client left, or the server stops", code="cancelled")
    if event.finish_reason == "deadline" and not event.token_ids:
        raise ApiError(504, "the time of the request was over before its first token", code="deadline")
    return event


def _log_tokens(request: Request, deltas: list[TextDelta], ends: Mapping[int, Generation]) -> int:
    """Log the number of generated tokens and return it."""
    loops = sum(delta.depth for delta in deltas)
    late = {"deadline": True} if any(end.finish_reason == "deadline" for end in ends.values()) else {}
    note(request, completion_tokens=len(deltas), mean_depth=round(loops / max(len(deltas), 1), 3), **late)
    return len(deltas)
