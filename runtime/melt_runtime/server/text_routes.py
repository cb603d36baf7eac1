"""Routes that need no model: the tokens of a text, the text of tokens, the tokenizer's facts, and the version."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from ..errors import ArgumentError
from ..machine import installed_versions
from ..text.tokenizer import TextTokenizer
from .failures import ApiError
from .intake import Intake
from .service import Service
from .text_schema import DetokenizeBody, TokenizeBody
from .tool_prompts import rendered

DISTRIBUTION = "melt-export"
_CHARACTERS, _LEAST = 64, 1 << 18  # the most characters of a text: per token of the cache, and in any case


def add_text_routes(app: FastAPI, service: Service, intake: Intake) -> None:
    """Add /tokenize, /detokenize, /tokenizer_info and /version."""

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return JSONResponse(await intake.prepare(request, TokenizeBody, lambda call: _tokenized(service, call)))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return JSONResponse(await intake.prepare(request, DetokenizeBody, lambda call: _text(service, call)))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return JSONResponse(_facts(service))

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": installed_versions([DISTRIBUTION]).get(DISTRIBUTION, "unknown")})


def _tokenized(service: Service, call: TokenizeBody) -> dict[str, Any]:
    """Return the tokens of a text, also of one that does not fit, whose tokens a client wants to count. Raises ApiError
    for one many times longer, which would take seconds."""
    tokenizer = _tokenizer(service, call)
    if call.messages is None:
        assert call.prompt is not None
        text, special = call.prompt, call.add_special_tokens is not False
    else:
        variables = {**(call.chat_template_kwargs or {})}
        if call.add_generation_prompt is not None:
            variables["add_generation_prompt"] = call.add_generation_prompt
        messages = [message.plain() for message in call.messages]
        assert service.format is not None
        text = rendered(tokenizer, service.format, messages, call.tools or (), variables)
        special = bool(call.add_special_tokens)
    room = service.runtime.manifest.max_seq_len
    most = max(_CHARACTERS * room, _LEAST)
    if len(text) > most:
        field = "prompt" if call.messages is None else "messages"
        raise ApiError(400, f"{len(text):,} characters are more than the {most:,} that are tokenized", field)
    ids = tokenizer.encode(text, add_special_tokens=special)
    names = [tokenizer.backend_tokenizer.id_to_token(one) for one in ids] if call.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": room,
        "tokens": ids,
        "token_strs": names,
    }


def _text(service: Service, call: DetokenizeBody) -> dict[str, Any]:
    return {"prompt": _tokenizer(service, call).decode(call.tokens, skip_special_tokens=False)}


def _facts(service: Service) -> dict[str, Any]:
    """Return the special tokens by name and the chat template, as in tokenizer_config.json. Where no end-of-text token
    is named, it is one that ends the model's texts."""
    tokenizer = _tokenizer(service)
    ends = [end.text for end in service.runtime.end_tokens if end.text is not None and not end.chats_only]
    return {
        "eos_token": next(iter(ends), None),
        **tokenizer.special_tokens,
        "chat_template": tokenizer.template_source(),
        "model_max_length": service.runtime.manifest.max_seq_len,
    }


def _tokenizer(service: Service, call: TokenizeBody | DetokenizeBody | None = None) -> TextTokenizer:
    if call is not None and call.model is not None:
        service.check_model(call.model)
    if service.runtime.tokenizer is None:
        raise ArgumentError("the package has no tokenizer")
    return service.runtime.tokenizer
