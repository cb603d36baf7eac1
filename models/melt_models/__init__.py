"""PyTorch models of looped language models, registered with transformers' Auto classes: LoopLM (Ouro), Nanbeige, Huginn
and the models retrofitted with its recurrence, and MELT.

Importing this package does not import PyTorch; the first use of one of the model classes does, or of transformers' Auto
classes. Commands can therefore check their arguments quickly.
"""

from typing import TYPE_CHECKING, Any

from .auto import before_auto_classes
from .errors import CheckpointError, UnsupportedConfigError

if TYPE_CHECKING:
    from .cache import MeltCache
    from .configuration import LoopLMConfig, MeltConfig
    from .families.huginn import HuginnConfig, HuginnForCausalLM
    from .families.nanbeige import NanbeigeConfig, NanbeigeForCausalLM
    from .looplm import LoopLMForCausalLM
    from .melt import MeltForCausalLM

__all__ = [
    "CheckpointError",
    "HuginnConfig",
    "HuginnForCausalLM",
    "LoopLMConfig",
    "LoopLMForCausalLM",
    "MeltCache",
    "MeltConfig",
    "MeltForCausalLM",
    "NanbeigeConfig",
    "NanbeigeForCausalLM",
    "UnsupportedConfigError",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _import_models()
    return globals()[name]


def _import_models() -> None:
    """Import all model classes, which registers them with transformers."""
    from . import cache, configuration, looplm, melt
    from .families import huginn, nanbeige

    for module in (cache, configuration, looplm, melt, huginn, nanbeige):
        globals().update({name: getattr(module, name) for name in __all__ if hasattr(module, name)})


before_auto_classes(_import_models)
