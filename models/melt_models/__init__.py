"""PyTorch models of looped language models: LoopLM (Ouro) and MELT, registered with transformers' Auto classes.

Importing this package does not import PyTorch; the first use of one of the model classes does. Commands can therefore
check their arguments quickly.
"""

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, UnsupportedConfigError

if TYPE_CHECKING:
    from .cache import MeltCache
    from .configuration import LoopLMConfig, MeltConfig
    from .looplm import LoopLMForCausalLM
    from .melt import MeltForCausalLM

__all__ = [
    "CheckpointError",
    "LoopLMConfig",
    "LoopLMForCausalLM",
    "MeltCache",
    "MeltConfig",
    "MeltForCausalLM",
    "UnsupportedConfigError",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import cache, configuration, looplm, melt

    for module in (cache, configuration, looplm, melt):
        globals().update({name: getattr(module, name) for name in __all__ if hasattr(module, name)})
    return globals()[name]
