"""Every way in which the runtime refuses: one family, so that an application can catch it as a whole."""


class MeltError(Exception):
    """Base of all errors the runtime raises on purpose. The message is one clear sentence."""


class PackageError(MeltError):
    """A package is missing something, was changed, or was made for another version."""


class BackendError(MeltError):
    """A backend is not installed, cannot run this package, or failed while running it."""


class ArgumentError(MeltError, ValueError):
    """An argument makes no sense: loops below 1, a temperature below 0, an unknown option."""


class PromptError(MeltError, ValueError):
    """A prompt cannot be used: empty, longer than the cache, or with token ids outside the vocabulary."""
