"""Every way in which the runtime refuses: one family, so that an application can catch it as a whole."""

from __future__ import annotations

from .results import Generation


class MeltError(Exception):
    """Base of all errors the runtime raises on purpose. The message is one clear sentence."""


class MeltWarning(UserWarning):
    """What was asked for runs, and the answers may disappoint."""


class PackageError(MeltError):
    """A package is missing something, was changed, or was made for another version."""


class BackendError(MeltError):
    """A backend is not installed, cannot run this package, or failed while running it."""


class ArgumentError(MeltError, ValueError):
    """An argument makes no sense: loops below 1, a temperature below 0, an unknown option."""


class OvertakenError(ArgumentError):
    """A stream cannot go on: another call has moved its session on, or has taken its state. Begin another."""


class PromptError(MeltError, ValueError):
    """A prompt cannot be used: empty, longer than the cache, or with token ids outside the vocabulary."""


class SessionError(MeltError):
    """A saved session cannot be read or written: it is damaged, was changed, or belongs to another package."""


class BusyError(MeltError):
    """No room: the queue is full. ``retry_after``: seconds until there may be, by how fast requests ended lately."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(MeltError):
    """A scheduler takes no more requests, or ended before this one did."""


class CancelledError(MeltError):
    """A request was cancelled. ``generation``: what there was by then."""

    def __init__(self, message: str, generation: Generation):
        super().__init__(message)
        self.generation = generation


class DeadlineError(CancelledError):
    """A request's time was over before it was."""
