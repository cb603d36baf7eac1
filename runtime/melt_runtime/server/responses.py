"""Replies in the format of OpenAI's responses: items, whole or as a stream of named events."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from time import time
from typing import Any
from uuid import uuid4

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from ..errors import MeltError
from ..results import Generation, TextDelta
from .answering import ended, log_tokens
from .failures import ApiError, as_api_error
from .guard import note, request_id
from .replies import usage
from .reply_parser import Reading, ReplyParser, reasoning_tokens
from .responses_schema import ResponsesBody
from .said import Said
from .service import Job, Service
from .streaming import EventStream, Feed, SendEvent

Fields = dict[str, Any]
_PREFIX = {"text": "msg", "reasoning": "rs", "call": "fc"}


class ItemWriter:
    """Writes the items of one reply, and the events that tell of them. ``items``: those begun so far."""

    def __init__(self, reading: Reading | None):
        self._parser = None if reading is None else ReplyParser(reading)
        self._id_length = None if reading is None else reading.format.id_length
        self._kind: str | None = None  # of the open item
        self.items: list[Fields] = []

    def take(self, text: str, end: bool = False) -> list[Fields]:
        """Take text. Return the events that it causes."""
        if self._parser is None:
            said: Iterable[Said] = [Said("text", text)] if text else []
        else:
            said = self._parser.feed(text) + (self._parser.finish() if end else [])
        return [event for part in said for event in self._part(part)]

    def close(self, status: str) -> list[Fields]:
        """End the open item and return its events. ``status``: "completed" or "incomplete"."""
        if self._kind is None:
            return []
        kind, self._kind = self._kind, None
        item = self.items[-1]
        item["status"] = status
        where = self._where(item)
        if kind == "call":
            done = {"type": "response.function_call_arguments.done", **where, "name": item["name"]}
            events = [{**done, "arguments": item["arguments"]}]
        else:
            place, part = {**where, "content_index": 0}, item["content"][0]
            name = "output_text" if kind == "text" else "reasoning_text"
            more: Fields = {"logprobs": []} if kind == "text" else {}
            events = [
                {"type": f"response.{name}.done", **place, "text": part["text"], **more},
                {"type": "response.content_part.done", **place, "part": dict(part)},
            ]
        return [*events, {"type": "response.output_item.done", **self._index(), "item": _copy(item)}]

    def _part(self, part: Said) -> list[Fields]:
        events: list[Fields] = []
        kind = "call" if part.kind == "arguments" else part.kind
        if part.kind == "call" or kind != self._kind:
            events += [*self.close("completed"), *self._open(kind, part)]
        if part.kind == "call":
            return events
        item = self.items[-1]
        where = self._where(item)
        if part.kind == "arguments":
            item["arguments"] += part.text
            events.append({"type": "response.function_call_arguments.delta", **where, "delta": part.text})
            return events
        item["content"][0]["text"] += part.text
        place = {**where, "content_index": 0, "delta": part.text}
        if kind == "text":
            return [*events, {"type": "response.output_text.delta", **place, "logprobs": []}]
        return [*events, {"type": "response.reasoning_text.delta", **place}]

    def _open(self, kind: str, part: Said) -> list[Fields]:
        """Begin an item."""
        own = uuid4().hex
        item: Fields = {"id": f"{_PREFIX[kind]}_{own}", "status": "in_progress"}
        content: Fields | None = None
        if kind == "call":
            called = f"call_{own[:24]}" if self._id_length is None else own[: self._id_length]
            item |= {"type": "function_call", "call_id": called, "name": part.text, "arguments": ""}
        elif kind == "reasoning":
            content = {"type": "reasoning_text", "text": ""}
            item |= {"type": "reasoning", "summary": []}
        else:
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item |= {"type": "message", "role": "assistant"}
        self._kind = kind
        self.items.append(item)
        told = {"type": "response.output_item.added", **self._index()}
        if content is None:
            return [{**told, "item": dict(item)}]
        item["content"] = []
        added = {**told, "item": _copy(item)}
        item["content"].append(content)
        place = {**self._where(item), "content_index": 0}
        return [added, {"type": "response.content_part.added", **place, "part": dict(content)}]

    def _index(self) -> Fields:
        return {"output_index": len(self.items) - 1}

    def _where(self, item: Fields) -> Fields:
        return {"item_id": item["id"], **self._index()}


def _copy(item: Fields) -> Fields:
    return {**item, **({"content": [dict(part) for part in item["content"]]} if "content" in item else {})}


async def respond(service: Service, request: Request, call: ResponsesBody, job: Job) -> Response:
    """Run a call and answer it."""
    feed = Feed(service.scheduler, job.requests, service.backlog)
    note(request, choices=1, prompt_tokens=job.prompt_tokens, stream=bool(call.stream))
    frame = partial(_frame, service, call, f"resp_{request_id(request)}", int(time()))
    if call.stream:
        return EventStream(feed, lambda send_event: _stream(request, frame, feed, job, send_event))
    writer, deltas, end = ItemWriter(job.reading), list[TextDelta](), None
    async with feed.for_client(request.receive):
        async for _, event in feed:
            if isinstance(event, TextDelta):
                deltas.append(event)
            else:
                end = ended(event)
    assert end is not None
    log_tokens(request, [deltas], {0: end})
    writer.take(end.text, end=True)
    writer.close(_status(end))
    return JSONResponse(frame(writer.items, _status(end), _facts(job, deltas, end)))


async def _stream(request: Request, frame: Any, feed: Feed, job: Job, send_event: SendEvent) -> None:
    """Send the events of a response, numbered. An error ends it early."""
    writer, deltas, number, told = ItemWriter(job.reading), list[TextDelta](), 0, 0
    end: Generation | None = None

    async def send(event: Fields) -> None:
        nonlocal number
        await send_event({**event, "sequence_number": number}, event["type"])
        number += 1

    begun = frame([], "in_progress", {})
    await send({"type": "response.created", "response": begun})
    await send({"type": "response.in_progress", "response": begun})
    try:
        async for _, event in feed:
            if isinstance(event, TextDelta):
                deltas.append(event)
                told += len(event.text)
                for one in writer.take(event.text):
                    await send(one)
            else:
                end = ended(event)
    except (MeltError, ApiError) as error:
        note(request, error=str(error))
        failure = as_api_error(error) if isinstance(error, MeltError) else error
        await send({"type": "error", "code": failure.code, "message": str(failure), "param": failure.param})
        return
    finally:
        log_tokens(request, [deltas], {} if end is None else {0: end})
    assert end is not None
    for one in [*writer.take(end.text[told:], end=True), *writer.close(_status(end))]:
        await send(one)
    whole = frame(writer.items, _status(end), _facts(job, deltas, end))
    await send({"type": f"response.{_status(end)}", "response": whole})


def _status(end: Generation) -> str:
    return "completed" if end.finish_reason == "stop" else "incomplete"


def _facts(job: Job, deltas: list[TextDelta], end: Generation) -> Fields:
    """Return what is known at the end: counts of tokens, and what only a looped model has, as in chats."""
    counts = usage(job.prompt_tokens, len(deltas), job.cached_tokens({0: end}))
    used = {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": counts["prompt_tokens_details"],
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": reasoning_tokens(job.reading, (delta.text for delta in deltas)) or 0
        },
        "total_tokens": counts["total_tokens"],
    }
    late = {"deadline": True} if end.finish_reason == "deadline" else {}
    details = None if end.finish_reason == "stop" else {"reason": "max_output_tokens"}
    depth = {"depth": [delta.depth for delta in deltas], "token_ids": list(end.token_ids), "saved": end.saved}
    warned = {"warnings": list(end.warnings)} if end.warnings else {}
    return {"usage": used, "incomplete_details": details, **depth, **warned, **late}


def _frame(
    service: Service, call: ResponsesBody, own: str, created: int, items: list[Fields], status: str, facts: Fields
) -> Fields:
    """Return a response with the settings that it was made with."""
    form = None if call.text is None or call.text.format is None else call.text.format
    choice = call.tool_choice or "auto"
    return {
        "id": own,
        "object": "response",
        "created_at": created,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": call.instructions,
        "max_output_tokens": call.max_output_tokens,
        "metadata": call.metadata or {},
        "model": service.name,
        "output": list(items),
        "parallel_tool_calls": call.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None if call.reasoning is None else call.reasoning.effort, "summary": None},
        "store": False,
        "temperature": 1.0 if call.temperature is None else call.temperature,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in call.tools or ()],
        "top_p": 1.0 if call.top_p is None else call.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": call.user,
        **facts,
    }
