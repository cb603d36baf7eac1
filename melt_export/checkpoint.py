"""A checkpoint that is opened once for all steps of an export and its verification."""

from __future__ import annotations

from copy import copy
from pathlib import Path

from melt_models import MeltConfig
from melt_models.checkpoint import LoopedModel, load_weights, meta_model, open_checkpoint
from melt_models.configuration import LoopedConfig
from melt_models.convert import melt_config

from .errors import ExportError


class Checkpoint:
    """A looped model's checkpoint directory with checked configuration, tensor names and shapes.

    ``weights`` reads tensors from disk and checks each for NaN on its first read. Raises CheckpointError.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        model, self.weights = open_checkpoint(directory)
        self.config: LoopedConfig = model.config
        self.own: LoopedConfig = model.config  # as it was trained

    @classmethod
    def of(cls, checkpoint: Path | Checkpoint) -> Checkpoint:
        """Open a directory, or return a checkpoint that is already open."""
        return checkpoint if isinstance(checkpoint, Checkpoint) else cls(checkpoint)

    def sharing(self, loops: int | None = None) -> Checkpoint:
        """Return the checkpoint as a model whose loops rewrite one cache per layer, so that the last one counts.

        ``loops``: run by default; None: as trained. Raises ExportError for a model whose loops share caches already.
        """
        if isinstance(self.config, MeltConfig):
            if self.config is not self.own:
                return self
            raise ExportError("the checkpoint is a MELT: its loops share their caches already")
        return self._configured(melt_config(self.own, loops=loops, aggregation="last"))

    def as_trained(self) -> Checkpoint:
        """Return the checkpoint with the caches that it was trained with."""
        return self._configured(self.own)

    def _configured(self, config: LoopedConfig) -> Checkpoint:
        """Return the checkpoint, which stays open, with another configuration."""
        made = copy(self)
        made.config = config
        return made

    def without_weights(self) -> LoopedModel:
        """Return a new model on PyTorch's meta device."""
        return meta_model(self.config)

    def load(self) -> LoopedModel:
        """Return a new model whose weights are memory-mapped in their stored types, for ``Float32Matmul``.

        While it lives it uses disk pages but no memory of its own. Free it before graphs are written or a package is
        loaded.
        """
        return load_weights(self.without_weights(), self.weights).requires_grad_(False)
