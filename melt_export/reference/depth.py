"""How deep a package thinks unless it is asked otherwise, as its checkpoint says."""

from __future__ import annotations

from melt_models import LoopLMConfig, MeltConfig
from melt_models.configuration import LoopedConfig

from ..errors import ExportError


def default_depth(config: LoopedConfig) -> int:
    """Return how many loops a package runs by default: up to the loop whose output a LoopLM reads, else all.

    Raises ExportError for a LoopLM whose tokens leave early: later caches would lack their keys and values.
    """
    if not isinstance(config, LoopLMConfig):
        return config.total_ut_steps
    if config.early_exit_step is not None:
        return config.early_exit_step + 1
    if config.early_exit_threshold < 1.0:
        raise ExportError(
            f"early_exit_threshold is {config.early_exit_threshold}; a LoopLM package has one cache per loop and runs "
            "every loop: set it to 1.0 in config.json, or turn the checkpoint into a MELT with melt-convert"
        )
    return config.total_ut_steps


def default_threshold(config: LoopedConfig) -> float:
    """Return the exit threshold of a package; the tokens of a LoopLM never leave early."""
    return config.early_exit_threshold if isinstance(config, MeltConfig) else 1.0
