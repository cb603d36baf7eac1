"""The application and its routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ..errors import MeltError
from ..machine import installed_versions
from .answering import answer
from .chat_schema import ChatBody
from .docs import add_docs
from .embeddings import EmbeddingBody, embed, requests_of
from .failures import ApiError, as_api_error
from .guard import Guard, Keys
from .intake import Intake, Preparation
from .metrics import CONTENT_TYPE, prometheus
from .origins import allow_origins
from .page import add_page, memory
from .process import trim_memory
from .responses import respond
from .responses_schema import ResponsesBody
from .schema import CompletionBody
from .service import Service
from .text_routes import add_text_routes

_TRIM_SECONDS = 30.0


@dataclass(frozen=True)
class Limits:
    """Limits on requests: body size, API keys, local hosts only (see Guard), whether prompts are logged, and the
    origins of web pages that may read answers."""

    max_body: int = 1 << 20
    keys: Keys = field(default_factory=Keys)
    local: bool = False
    log_prompts: bool = False
    origins: Sequence[str] = ()


def build_app(service: Service, limits: Limits) -> FastAPI:
    """Build the application around a service, whose scheduler it closes at its end."""
    preparation = Preparation(service.scheduler.slots + service.scheduler.max_waiting)
    intake = Intake(preparation, limits.max_body, limits.log_prompts)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=_lifespan(service, preparation))
    app.add_middleware(Guard, keys=limits.keys, local=limits.local)
    if limits.origins:
        allow_origins(app, limits.origins)
    _add_failures(app)
    _add_facts(app, service)
    add_text_routes(app, service, intake)
    add_docs(app)
    add_page(app)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        call, job = await intake.prepare(request, CompletionBody, lambda call: (call, service.job(call)))
        return await answer(service, request, call, job)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        call, job = await intake.prepare(request, ChatBody, lambda call: (call, service.job(call)))
        return await answer(service, request, call, job)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        call, job = await intake.prepare(request, ResponsesBody, lambda call: (call, service.job(call.chat())))
        return await respond(service, request, call, job)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        call, requests = await intake.prepare(request, EmbeddingBody, lambda call: (call, requests_of(service, call)))
        return JSONResponse(await embed(service, request, call, requests))

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
        "exit": manifest.exit.get("criteria"),
        "exit_loops": manifest.exit_loops if manifest.exit else None,
        "max_seq_len": manifest.max_seq_len,
        "max_tokens": service.max_tokens,
        "max_seconds": service.max_seconds,
        "max_loops": service.max_loops,
        "chat": service.runtime.tokenizer is not None and service.runtime.tokenizer.has_chat_template,
        "example_prompt": service.runtime.example_prompt,
        "memory": memory(manifest),
    }

    build = {
        "version": installed_versions(["melt-export"]).get("melt-export", ""),
        "model": service.name,
        "package": service.runtime.package.hash[:12],
        "dialect": manifest.dialect,
        "precision": manifest.precision,
        "backend": service.runtime.backend.name,
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
        return PlainTextResponse(
            prometheus(scheduler.metrics(), service.backlog.unread, build), media_type=CONTENT_TYPE
        )

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
