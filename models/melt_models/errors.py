"""What can go wrong between a checkpoint on disk and a model in memory."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message says what is wrong, where, and what to do."""


class UnsupportedConfigError(CheckpointError):
    """A checkpoint asks for something this project does not implement."""
