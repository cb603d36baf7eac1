"""The schema of tools: functions that a chat may call, which of them it must call, and calls in its history."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Tag

from .fields import Strict, by_kind, invalid

MAX_TOOLS = 512
MAX_CALLS = 512  # in one message
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


def _of_an_object(parameters: dict[str, Any]) -> dict[str, Any]:
    if parameters.get("type", "object") != "object":
        raise invalid("it must be object: arguments are named", "type")
    return parameters


class Function(Strict):
    """A function: its parameters as the JSON schema of an object. Calls are held to it, ``strict`` or not."""

    name: FunctionName
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_of_an_object)] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """The JSON schema of a call's arguments."""
        return {"type": "object", **(self.parameters or {"properties": {}, "additionalProperties": False})}


class Tool(Strict):
    """A tool, which can only be a function."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it."""
        named = {"name": self.function.name, "description": self.function.description or ""}
        return {"type": "function", "function": {**named, "parameters": self.function.schema_of_arguments}}


class NamedFunction(Strict):
    """The name of a function."""

    name: FunctionName


class NamedTool(Strict):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


Choice = Annotated[
    Annotated[None, Tag("~none")]
    | Annotated[Literal["none", "auto", "required"], Tag("~word")]
    | Annotated[NamedTool, Tag("~named")],
    by_kind(
        {type(None): "~none", str: "~word", dict: "~named"},
        'it is "none", "auto", "required" or a function by its name',
    ),
]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class CalledFunction(Strict):
    """The function that was called. ``arguments``: JSON as text."""

    name: FunctionName
    arguments: str


class CallInHistory(Strict):
    """A call in an earlier message of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # of a stream's parts

    def plain(self) -> dict[str, Any]:
        """Return the call as chat templates expect it: with arguments as an object, where they are one."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.function.name, "arguments": as_object(self.function.arguments)},
        }


def as_object(text: str) -> dict[str, Any] | str:
    """Return the object that a text is in JSON, or the text if it is not one, as a model may have written it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
