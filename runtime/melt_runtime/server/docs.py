"""What the server answers, as OpenAPI for programs and as a page for people. Both make no request to other servers."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any, NamedTuple

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic.json_schema import GenerateJsonSchema

from .chat_schema import ChatBody
from .embeddings import EmbeddingBody
from .fields import Strict
from .responses_schema import ResponsesBody
from .schema import CompletionBody
from .text_schema import DetokenizeBody, TokenizeBody

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "code{font-size:.95em}table{border-collapse:collapse}td{padding:.1rem 1rem .1rem 0;vertical-align:top}"
    "h2{margin-top:2rem;font-size:1.1rem}"
)


class Route(NamedTuple):
    """A route that clients call. ``body``: the type of its body; None for a GET."""

    path: str
    summary: str
    body: type[Strict] | None = None


ROUTES = (
    Route("/v1/chat/completions", "Answer a chat.", ChatBody),
    Route("/v1/responses", "Answer in items: text, reasoning, and calls of functions.", ResponsesBody),
    Route("/v1/completions", "Continue prompts.", CompletionBody),
    Route("/v1/embeddings", "Return the mean of the last loop's hidden states of texts.", EmbeddingBody),
    Route("/tokenize", "Return the tokens of a text or a chat.", TokenizeBody),
    Route("/detokenize", "Return the text of tokens.", DetokenizeBody),
    Route("/v1/models", "List the model that is served."),
    Route("/v1/models/{name}", "Describe the model that is served."),
    Route("/v1/state", "Return the bytes of state, and how many requests run and wait."),
    Route("/tokenizer_info", "Return the tokenizer's special tokens and chat template."),
    Route("/version", "Return the version of the server."),
    Route("/health", "Return 200 while the process lives."),
    Route("/ready", "Return 200 while the server takes requests."),
    Route("/metrics", "Return metrics for Prometheus."),
)


def openapi() -> dict[str, Any]:
    """Return the description of all routes (OpenAPI 3.1)."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for route in ROUTES:
        call: dict[str, Any] = {"summary": route.summary, "responses": {"200": {"description": "The answer."}}}
        if "{name}" in route.path:
            call["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        if route.body is not None:
            schema = route.body.model_json_schema(
                ref_template="#/components/schemas/{model}", schema_generator=_AcceptedValues
            )
            schemas |= schema.pop("$defs", {})
            schemas[route.body.__name__] = schema
            reference = {"$ref": f"#/components/schemas/{route.body.__name__}"}
            call["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
        paths[route.path] = {"get" if route.body is None else "post": call}
    return {
        "openapi": "3.1.0",
        "info": {"title": "melt-run serve", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }


class _AcceptedValues(GenerateJsonSchema):
    """Schemas without the tags by which a union's branch is chosen."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default", "skipped-discriminator"}


def add_docs(app: FastAPI) -> None:
    """Add /openapi.json and /docs."""
    description = openapi()
    page = "".join(_page(description))

    @app.get("/openapi.json")
    async def openapi_json() -> Response:
        return JSONResponse(description)

    @app.get("/docs")
    async def docs() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"})


def _page(description: dict[str, Any]) -> Iterator[str]:
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>melt-run serve: API</title><style>{_STYLE}</style>"
    yield "<h1>API of this server</h1><p>The same for programs: <a href=/openapi.json>/openapi.json</a>. Requests are "
    yield "as OpenAI's; fields beyond OpenAI's are explained in docs/serving.md.</p>"
    schemas = description["components"]["schemas"]
    for path, calls in description["paths"].items():
        for method, call in calls.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(call['summary'])}</p>"
            if "requestBody" in call:
                reference = call["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                yield from _fields(schemas[reference.rpartition("/")[2]])


def _fields(schema: dict[str, Any]) -> Iterator[str]:
    """Yield a table of a body's fields, without those of which only null or nothing is possible."""
    yield "<table>"
    for name, field in schema["properties"].items():
        if field.get("type") == "null":
            continue
        needed = "required" if name in schema.get("required", ()) else ""
        yield f"<tr><td><code>{escape(name)}</code><td>{escape(_kind(field))}<td>{needed}"
    yield "</table>"


def _kind(field: dict[str, Any]) -> str:
    """Describe the type of a field in a few words."""
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    branches = field.get("anyOf") or field.get("oneOf")
    if branches:
        kinds = [_kind(one) for one in branches if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field:
        return " or ".join(map(repr, field["enum"]))
    if "const" in field:
        return repr(field["const"])
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"array of {_kind(field.get('items', {}))}"
    limits = [f"{sign} {field[name]:,}" for name, sign in _LIMITS.items() if name in field]
    return " ".join([kind, *([f"({', '.join(limits)})"] if limits else [])])


_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
