"""Errors raised while a checkpoint is read or converted."""

_MOST_CHARACTERS = 1000


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message says what is wrong, where, and what to do.

    Messages quote names and values from untrusted files, so control characters are escaped and long texts are cut.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class UnsupportedConfigError(CheckpointError):
    """A checkpoint's configuration asks for something that is not implemented."""


def printable(text: str) -> str:
    """Escape control characters of a text and cut it after 1,000 characters."""
    text = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown(value: object) -> str:
    """Quote a value for a message, in at most one line."""
    if isinstance(value, int) and abs(value) >= 10**40:  # Python refuses to print a number of thousands of digits
        return "a whole number of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
