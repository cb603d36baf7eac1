"""Looped language models in PyTorch: LoopLM (Ouro) and MELT, registered with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from .cache import MeltCache
from .configuration import LoopLMConfig, MeltConfig
from .errors import CheckpointError, UnsupportedConfigError
from .looplm import LoopLMForCausalLM
from .melt import MeltForCausalLM

AutoConfig.register("ouro", LoopLMConfig, exist_ok=True)
AutoConfig.register("melt", MeltConfig, exist_ok=True)
AutoModelForCausalLM.register(LoopLMConfig, LoopLMForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(MeltConfig, MeltForCausalLM, exist_ok=True)

__all__ = [
    "CheckpointError",
    "LoopLMConfig",
    "LoopLMForCausalLM",
    "MeltCache",
    "MeltConfig",
    "MeltForCausalLM",
    "UnsupportedConfigError",
]
