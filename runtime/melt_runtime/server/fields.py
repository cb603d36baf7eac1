"""What the fields of a request are made of: bounds, fields that may only ask for nothing, unions by what they hold."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, model_validator
from pydantic_core import PydanticCustomError

from ..text.stop_strings import MAX_STOP_CHARACTERS

MOST = (1 << 31) - 1  # of any count or id
TAG = "~"  # begins the name of a branch of a union, which is no part of a field's path

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Token = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=1024)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
Stop = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]


class Strict(BaseModel):
    """An object of which every field is known, and whose values are not converted. The first error is the only one, so
    that a body of many wrong fields costs no more than a right one."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, content: Any) -> Any:
        if isinstance(content, dict):
            names = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = next((key for key in content if key not in names), None)
            if unknown is not None:
                near = get_close_matches(unknown[:64], names, 1)
                hint = f"; is it {near[0]!r}?" if near else ""
                raise wrong(f"there is no such field{hint}", unknown[:64])
        return content


def wrong(sentence: str, field: str | None = None) -> PydanticCustomError:
    """What a validator raises. field: where in the value it is wrong."""
    found = {} if field is None else {"field": field}
    return PydanticCustomError("not_supported", "{sentence}", {"sentence": sentence, **found})  # type: ignore[arg-type]


def nothing(sentence: str, *allowed: Any) -> BeforeValidator:
    """Of a field that nothing here could honour: null and the ``allowed`` values, which ask for nothing, become None;
    any other is refused with the sentence."""

    def check(value: Any) -> None:
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise wrong(sentence)

    return BeforeValidator(check)


def by_kind(kinds: dict[type, str | Callable[[Any], str]], sentence: str) -> Discriminator:
    """The branch of a union by the JSON type of a value: a tag, or what gives one. Only this branch's error is told."""

    def tag(value: Any) -> str | None:
        found = next((kinds[kind] for kind in kinds if type(value) is kind), None)
        return found if found is None or isinstance(found, str) else found(value)

    return Discriminator(
        tag,
        custom_error_type="not_supported",
        custom_error_message="{sentence}",
        custom_error_context={"sentence": sentence},
    )
