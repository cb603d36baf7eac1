"""Types of request fields: bounds, unsupported fields, unions by JSON type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, model_validator
from pydantic_core import PydanticCustomError

from ..text.stop_strings import MAX_STOP_CHARACTERS

MOST = (1 << 31) - 1  # for counts and ids
TAG = "~"  # prefix of a union branch's name, which is not part of a field's path

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
    """An object with known fields only and no conversion of values. Only the first error is reported, to bound the cost
    of bad bodies.

    ``prompt_field``: the field of a request with what must fit the cache.
    """

    prompt_field: ClassVar[str | None] = None
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
                raise invalid(f"there is no such field{hint}", unknown[:64])
        return content

    @staticmethod
    def own_field(name: str) -> str:
        """Return the field, by its path, that a refusal is about where the request was made into another kind."""
        return name


def invalid(sentence: str, field: str | None = None) -> PydanticCustomError:
    """Make a validator's error. ``field``: the place within the value."""
    found = {} if field is None else {"field": field}
    return PydanticCustomError("not_supported", "{sentence}", {"sentence": sentence, **found})  # type: ignore[arg-type]


def unsupported(sentence: str, *allowed: Any) -> BeforeValidator:
    """Accept null and the ``allowed`` values, which request nothing, as None; refuse any other with the sentence."""

    def check(value: Any) -> None:
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise invalid(sentence)

    return BeforeValidator(check)


# OpenAI's words for how long a model reasons; "none" requests nothing.
Effort = Annotated[
    Literal["minimal", "low", "medium", "high", "xhigh", "max"] | None,
    BeforeValidator(lambda value: None if value == "none" else value),
]


class _Kinds(Discriminator):
    """A discriminator that may stand within a union: unions compare their branches' annotations by hash."""

    __hash__ = object.__hash__


def by_kind(kinds: dict[type, str | Callable[[Any], str]], sentence: str) -> Discriminator:
    """Choose a union's branch by the value's JSON type (a tag, or a function that returns one), so that only its errors
    show."""

    def tag(value: Any) -> str | None:
        found = next((kinds[kind] for kind in kinds if type(value) is kind), None)
        return found if found is None or isinstance(found, str) else found(value)

    return _Kinds(
        tag,
        custom_error_type="not_supported",
        custom_error_message="{sentence}",
        custom_error_context={"sentence": sentence},
    )


def prompt_kind(value: Sequence[Any]) -> str:
    """Return the tag of a list of prompts, or of a prompt's token ids, by its first item."""
    first = value[0] if value else 0
    return "~texts" if isinstance(first, str) else "~lists" if isinstance(first, list) else "~ids"
