"""A checkpoint that is opened once, for all steps of an export and of its verification."""

from __future__ import annotations

from pathlib import Path

from melt_models.checkpoint import LoopedModel, load_weights, meta_model, open_checkpoint
from melt_models.configuration import LoopedConfig


class Checkpoint:
    """A MELT or LoopLM checkpoint directory whose configuration, tensor names and shapes have been checked.

    ``weights`` reads tensors from disk, and looks for NaN when one is read for the first time. Raises CheckpointError.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        model, self.weights = open_checkpoint(directory)
        self.config: LoopedConfig = model.config

    @classmethod
    def of(cls, checkpoint: Path | Checkpoint) -> Checkpoint:
        """Open a directory; an open checkpoint is returned as it is."""
        return checkpoint if isinstance(checkpoint, Checkpoint) else cls(checkpoint)

    def without_weights(self) -> LoopedModel:
        """Return a new model on PyTorch's meta device."""
        return meta_model(self.config)

    def load(self) -> LoopedModel:
        """Return a new model whose weights are memory-mapped in their stored types, for ``Float32Matmul``.

        It takes no memory of its own, and disk pages only while it lives: hold it for the steps that run it, and let go
        of it before graphs are written or a package is loaded.
        """
        return load_weights(self.without_weights(), self.weights).requires_grad_(False)
