"""Errors that end an export or a verification."""

from melt_runtime.errors import MeltError


class ExportError(MeltError):
    """An export cannot go on. The message says why and what to do."""


class ParityError(MeltError):
    """The package does not compute what the checkpoint computes."""
