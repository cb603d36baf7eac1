"""Errors that end a training."""


class ConfigError(ValueError):
    """A run's file cannot be used. The message names the file, the section and the key."""


class SnapshotError(ValueError):
    """A stage cannot start or resume in its directory. The message says why, and what to do."""


class TrainingDivergedError(RuntimeError):
    """A loss or gradient is not finite. The message names the step, the loss's parts and the largest gradient."""
