"""The errors that the runtime raises on purpose. All of them are MeltError."""

from __future__ import annotations

from .results import Generation


class MeltError(Exception):
    """Base class of all errors that the runtime raises on purpose. The message is one sentence."""


class MeltWarning(UserWarning):
    """A warning that a request runs, but its answers may be poor."""


class PackageError(MeltError):
    """A package that is incomplete, was changed, or has another format version."""


class BackendError(MeltError):
    """A backend that is not installed, cannot run this package, or failed while running it."""


class ArgumentError(MeltError, ValueError):
    """An argument out of range (loops below 1, a temperature below 0) or an unknown option."""


class OvertakenError(ArgumentError):
    """A stream that cannot go on: another call moved its session on or took its state. Start a new stream."""


class PromptError(MeltError, ValueError):
    """A prompt that is empty, longer than the cache, or has token ids outside the vocabulary."""


class PromptTooLongError(PromptError):
    """A prompt with more tokens than the cache has room for."""


class SessionError(MeltError):
    """A saved session that cannot be read or written: damaged, changed, or of another package."""


class BusyError(MeltError):
    """The queue is full. ``retry_after``: seconds until there may be room, estimated from recent requests."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(MeltError):
    """The scheduler is closed, or closed before this request ended."""


class CancelledError(MeltError):
    """The request was cancelled. ``generation`` holds the tokens and text generated until then."""

    def __init__(self, message: str, generation: Generation):
        super().__init__(message)
        self.generation = generation


class DeadlineError(CancelledError):
    """The request did not end before its deadline."""
