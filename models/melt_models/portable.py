"""Models that can write the code they are defined in beside their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .remote_code import auto_map, write_code


class PortableModel(PreTrainedModel):
    """A model whose checkpoints open where this package is not installed, if they are asked to.

    ``save_pretrained(directory, remote_code=True)`` and ``push_to_hub(name, remote_code=True)`` write a self-contained
    modelling file, which ``AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`` loads. A model that was
    loaded from such a checkpoint writes it again. ``register_for_auto_class()`` asks for it in every checkpoint of a
    class.
    """

    _with_code = False

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Write the modelling file with every checkpoint of this class. Raises ValueError for another Auto class."""
        if auto_class not in ("AutoModel", "AutoModelForCausalLM"):
            raise ValueError(f"auto_class is {auto_class!r}; these are models for AutoModelForCausalLM")
        cls._with_code = True

    def save_pretrained(self, save_directory: Any, *args: Any, remote_code: bool = False, **kwargs: Any) -> None:
        """Write a checkpoint. ``remote_code``: with the modelling file; else as transformers does."""
        if remote_code or self._with_code:
            self.config.auto_map = auto_map(type(self))
        written = getattr(self.config, "auto_map", None) is not None
        pushed = kwargs.pop("push_to_hub", False) if written else False
        card = {name: kwargs.pop(name) for name in _CARD if name in kwargs} if pushed else {}
        super().save_pretrained(save_directory, *args, **kwargs)
        if written and Path(save_directory).is_dir():
            write_code(type(self), Path(save_directory))
        if pushed:
            self.push_to_hub(card.pop("repo_id", Path(save_directory).name), **card)

    def push_to_hub(self, *args: Any, remote_code: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """Upload the checkpoint. ``remote_code``: with the modelling file."""
        if remote_code:
            self.config.auto_map = auto_map(type(self))
        return super().push_to_hub(*args, **kwargs)


_CARD = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")
