"""What families share: reading a published config.json field by field into the core's configuration, or refusing it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..configuration import LoopLMConfig
from ..errors import UnsupportedConfigError, shown
from ..loading import EMBEDDING
from ..tensors import Weights

# Fields that mean the same in every family, kept as they are.
_KEPT = (
    "model_type",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_sliding_window",
    "quantization_config",
)


@strict
class PublishedConfig(LoopLMConfig):
    """A family's configuration, read from its published fields or from the core's, which ``save_pretrained`` writes."""

    model_type: ClassVar[str] = "published"

    exit_gate: bool = False

    @classmethod
    def core_fields(cls, content: Mapping[str, Any], directory: Path | None) -> dict[str, Any]:
        """Return the core's fields for a published config. ``directory``: its checkpoint, if known.

        Raises UnsupportedConfigError for what is not implemented, or not clear.
        """
        raise UnsupportedConfigError(f"{cls.model_type} has no published form")

    @classmethod
    def translated(cls, content: dict[str, Any], directory: Path | None = None) -> dict[str, Any]:
        """Return the core's fields of a config.json, published or saved by this package.

        Raises UnsupportedConfigError.
        """
        if "norm_layout" in content:
            return content
        return {name: content[name] for name in _KEPT if name in content} | cls.core_fields(content, directory)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        place = kwargs.get("name_or_path")
        directory = Path(place) if place is not None and any(Path(place).glob("*.safetensors")) else None
        return super().from_dict(cls.translated(config_dict, directory), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def is_own_layout(self, weights: Weights) -> bool:
        """Whether the tensors have the names of this package's models."""
        return EMBEDDING in weights

    def published_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the tensors of the published layout. ``expected``: those of this package's model."""
        return dict(expected)

    def rename(self, weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> Weights:
        """Check a published layout and return its tensors under the names ``expected``. Raises CheckpointError."""
        return weights


def is_set(value: object) -> bool:
    """Whether a field of a config switches something on: anything but absent, null, false or empty."""
    return value is not None and value is not False and value != [] and value != {} and value != ""


def flag(content: Mapping[str, Any], name: str) -> bool:
    """Return a field that is true or false; absent or null is false. Raises UnsupportedConfigError."""
    value = content.get(name)
    if not isinstance(value, bool | None):
        raise UnsupportedConfigError(f"{name} is {shown(value)}; it must be true or false")
    return bool(value)


def refuse_set(content: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raise UnsupportedConfigError for the first of these fields that is set. ``names``: what each one asks for."""
    for name, what in names.items():
        if is_set(content.get(name)):
            raise UnsupportedConfigError(f"{name} is {shown(content[name])}: {what} is not supported")


def refuse_other(content: Mapping[str, Any], known: Mapping[str, object]) -> None:
    """Raise UnsupportedConfigError for a field that is there and has another value than the one that is known."""
    for name, value in known.items():
        if name in content and content[name] != value:
            raise UnsupportedConfigError(f"{name} is {shown(content[name])}; only {shown(value)} is supported")


def needed(content: Mapping[str, Any], *names: str) -> Any:
    """Return the first of these fields that is there. Raises UnsupportedConfigError if none is."""
    for name in names:
        if content.get(name) is not None:
            return content[name]
    raise UnsupportedConfigError(f"the config has no {names[0]}, without which the model is not known")
