"""Answer a call: run its requests, and send what they give whole or as a stream of events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from ..errors import MeltError
from ..results import Generation, TextDelta
from .chat_schema import ChatBody
from .failures import ApiError, as_api_error
from .guard import note, request_id
from .replies import ReplyFormat, StreamedChoice, usage
from .reply_parser import reasoning_tokens
from .schema import CompletionBody
from .service import Job, Service
from .streaming import Event, EventStream, Feed


async def answer(service: Service, request: Request, call: CompletionBody | ChatBody, job: Job) -> Response:
    chat = isinstance(call, ChatBody)
    reply_format = ReplyFormat(
        chat, request_id(request), service.name, service.fingerprint, service.runtime.tokenizer, job.reading
    )
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
                ends[index] = ended(event)
    generated = log_tokens(request, deltas, ends)
    choices = await run_in_threadpool(_choices, reply_format, job, deltas, ends, _asks_logprobs(call))
    counts = usage(job.prompt_tokens, generated, job.cached_tokens(ends), _reasoning(job, deltas))
    return JSONResponse(reply_format.frame(choices, part=False, usage=counts))


def _choices(
    reply_format: ReplyFormat,
    job: Job,
    deltas: Sequence[Sequence[TextDelta]],
    ends: Mapping[int, Generation],
    logprobs: bool,
) -> list[dict[str, Any]]:
    """Return the finished choices: of each prompt those whose tokens are the likeliest, where more were generated."""
    made: list[dict[str, Any]] = []
    for first in range(0, len(deltas), job.choices):
        of_prompt = list(range(first, first + job.choices))
        if job.told < job.choices:
            of_prompt = sorted(of_prompt, key=lambda index: -_likelihood(deltas[index]))[: job.told]
        for index in of_prompt:
            shown = deltas[index] if logprobs else [delta._replace(logprobs=None) for delta in deltas[index]]
            made.append(reply_format.whole(len(made), shown, ends[index], job.echo(index), job.requests[index].prompt))
    return made


def _likelihood(deltas: Sequence[TextDelta]) -> float:
    """Return the mean log probability of a choice's tokens, by which best_of compares choices."""
    known = [delta.logprobs.token for delta in deltas if delta.logprobs is not None]
    return sum(known) / len(known) if known else 0.0


def _reasoning(job: Job, deltas: Sequence[Sequence[TextDelta]]) -> int | None:
    """Return how many tokens of all choices are reasoning; None: the model does not reason aloud."""
    counts = [reasoning_tokens(job.reading, (delta.text for delta in one)) for one in deltas]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _asks_logprobs(call: CompletionBody | ChatBody) -> bool:
    return bool(call.logprobs) if isinstance(call, ChatBody) else call.logprobs is not None


async def _stream(
    request: Request,
    reply_format: ReplyFormat,
    feed: Feed,
    job: Job,
    counted: bool,
    send_event: Callable[[Any], Awaitable[None]],
) -> None:
    """Send each token as an event as it comes. An error that ends the stream early is sent instead of [DONE]."""
    choices = [
        StreamedChoice(reply_format, index, partial(job.echo, index), one.prompt)
        for index, one in enumerate(job.requests)
    ]
    last: dict[int, TextDelta] = {}  # sent with the end, which follows at once
    deltas: list[list[TextDelta]] = [[] for _ in job.requests]
    ends: dict[int, Generation] = {}
    blank = {"usage": None} if counted else {}
    echoing = set(range(len(choices))) if job.echoes else set()  # a prompt's logprobs take a while

    async def made(index: int, delta: TextDelta | None, end: Generation | None = None) -> dict[str, Any]:
        if index not in echoing:
            return choices[index].part(delta, end)
        echoing.remove(index)
        return await run_in_threadpool(choices[index].part, delta, end)

    try:
        async for index, event in feed:
            if isinstance(event, TextDelta):
                deltas[index].append(event)
                if event.finish_reason is not None:
                    last[index] = event
                    continue
                part = await made(index, event)
            else:
                ends[index] = ended(event)
                part = await made(index, last.get(index), ends[index])
            await send_event(reply_format.frame([part], part=True, **blank))
    except (MeltError, ApiError) as error:
        note(request, error=str(error))
        await send_event((as_api_error(error) if isinstance(error, MeltError) else error).body())
        return
    finally:
        generated = log_tokens(request, deltas, ends)
    if counted:
        counts = usage(job.prompt_tokens, generated, job.cached_tokens(ends), _reasoning(job, deltas))
        await send_event(reply_format.frame([], part=True, usage=counts))
    await send_event("[DONE]")


def ended(event: Event) -> Generation:
    """Return a request's Generation. Raises the error that ended it before any output, or ApiError if it was
    cancelled."""
    assert not isinstance(event, TextDelta)
    if isinstance(event, MeltError):
        raise event
    if event.finish_reason == "cancelled":
        raise ApiError(503, "the request was cancelled: its client left, or the server stops", code="cancelled")
    if event.finish_reason == "deadline" and not event.token_ids:
        raise ApiError(504, "the time of the request was over before its first token", code="deadline")
    return event


def log_tokens(request: Request, deltas: Sequence[Sequence[TextDelta]], ends: Mapping[int, Generation]) -> int:
    """Log the number of tokens that were generated for all choices and return it."""
    count = sum(map(len, deltas))
    loops = sum(delta.depth for one in deltas for delta in one)
    late = {"deadline": True} if any(end.finish_reason == "deadline" for end in ends.values()) else {}
    note(request, completion_tokens=count, mean_depth=round(loops / max(count, 1), 3), **late)
    return count
