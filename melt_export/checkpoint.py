"""A checkpoint that is opened once for all steps of an export and its verification."""

from __future__ import annotations

from pathlib import Path

from melt_models.checkpoint import LoopedModel, load_weights, meta_model, open_checkpoint
from melt_models.configuration import LoopedConfig


class Checkpoint:
    """A MELT or LoopLM checkpoint directory with checked configuration, tensor names and shapes.

    ``weights`` reads tensors from disk and checks each for NaN on its first read. Raises CheckpointError.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        model, self.weights = open_checkpoint(directory)
        self.config: LoopedConfig = model.config

    @classmethod
    def of(cls, checkpoint: Path | Checkpoint) -> Checkpoint:
        """Open a directory, or return a checkpoint that is already open."""
        return checkpoint if isinstance(checkpoint, Checkpoint) else cls(checkpoint)

    def without_weights(self) -> LoopedModel:
        """Return a new model on PyTorch's meta device."""
        return meta_model(self.config)

    def load(self) -> LoopedModel:
        """Return a new model whose weights are memory-mapped in their stored types, for ``Float32Matmul``.

        While it lives it uses disk pages but no memory of its own. Free it before graphs are written or a package is
        loaded.
        """
        return load_weights(self.without_weights(), self.weights).requires_grad_(False)
