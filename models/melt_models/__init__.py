"""PyTorch models of looped language models, registered with transformers' Auto classes: LoopLM (Ouro), Nanbeige, Huginn
and the models retrofitted with its recurrence, and MELT.

Importing this package does not import PyTorch; the first use of one of the model classes does. Commands can therefore
check their arguments quickly.
"""

from typing import TYPE_CHECKING, Any

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
    from . import cache, configuration, looplm, melt
    from .families import huginn, nanbeige

    for module in (cache, configuration, looplm, melt, huginn, nanbeige):
        globals().update({name: getattr(module, name) for name in __all__ if hasattr(module, name)})
    return globals()[name]
