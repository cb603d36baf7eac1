"""Embeddings: the mean of a text's hidden states after the last loop of each token."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import monotonic
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from fastapi import Request as HttpRequest
from numpy.typing import NDArray
from pydantic import Field, Tag

from ..decoding.prompt_reading import MeanHidden
from ..scheduler.request import Request
from .answering import ended
from .fields import Count, Name, Seconds, Share, Strict, Tokens, by_kind, prompt_kind
from .guard import note
from .prompts import prompts_encoded
from .service import Service
from .streaming import Feed

MAX_INPUTS = 2048
_NO_TIME = 1e-9  # seconds: a request that is over before it runs
POOLING = "mean of the last loop's hidden states"


class EmbeddingBody(Strict):
    """One text or several, or their token ids. ``loops``, ``exit_threshold`` and ``max_seconds`` are extensions of
    OpenAI's API."""

    prompt_field: ClassVar[str | None] = "input"
    model: Name
    input: Annotated[
        Annotated[str, Tag("~text")]
        | Annotated[list[str], Field(max_length=MAX_INPUTS, fail_fast=True), Tag("~texts")]
        | Annotated[Tokens, Tag("~ids")]
        | Annotated[list[Tokens], Field(max_length=MAX_INPUTS, fail_fast=True), Tag("~lists")],
        by_kind({str: "~text", list: prompt_kind}, "input is text, token ids, or a list of either"),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: str | None = None
    loops: Count | None = None
    exit_threshold: Share | None = None
    max_seconds: Seconds | None = None


def requests_of(service: Service, call: EmbeddingBody) -> list[Request]:
    """Make the requests of a call, one per text. Raises ApiError, MeltError."""
    service.check_model(call.model)
    service.check_width(call.dimensions)
    options = service.runtime.options(**service.depth(call), max_tokens=1)
    deadline = service.deadline(call.max_seconds)
    made = [
        Request(tuple(ids), options, deadline, reading=MeanHidden(), prompt_only=True)
        for ids in prompts_encoded(service.runtime, call.input)
    ]
    for request in made:
        request.check(service.runtime.manifest, service.runtime.tokenizer is not None)
    return made


async def embed(
    service: Service, request: HttpRequest, call: EmbeddingBody, requests: Sequence[Request]
) -> dict[str, Any]:
    """Run the requests, as many at a time as there are slots, and return the reply. Their deadline is that of all
    together. Raises ApiError, MeltError."""
    tokens = sum(len(one.prompt) for one in requests)
    note(request, choices=len(requests), prompt_tokens=tokens, stream=False)
    found: list[NDArray[np.float32]] = []
    began = monotonic()
    for group in _groups(requests, service.scheduler.slots):
        feed = Feed(service.scheduler, [_later(one, monotonic() - began) for one in group], service.backlog)
        async with feed.for_client(request.receive):
            async for _, event in feed:
                ended(event)
        found += [one.reading.mean() for one in group if isinstance(one.reading, MeanHidden)]
    data = [
        {"object": "embedding", "index": index, "embedding": _written(one, call.encoding_format)}
        for index, one in enumerate(found)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": service.name, "usage": usage, "pooling": POOLING}


def _later(request: Request, seconds: float) -> Request:
    """Return a request as it is so many seconds after its call began."""
    assert request.deadline is not None
    return replace(request, deadline=max(request.deadline - seconds, _NO_TIME))


def _groups(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    return (requests[at : at + size] for at in range(0, len(requests), size))


def _written(values: NDArray[np.float32], form: str | None) -> str | list[float]:
    if form == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    return [float(value) for value in values]
