"""What can go wrong between a checkpoint on disk and a model in memory."""

_MOST_CHARACTERS = 1000


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message says what is wrong, where, and what to do.

    It quotes names and values of files that may come from anyone: control characters are escaped, and it has an end.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class UnsupportedConfigError(CheckpointError):
    """A checkpoint asks for something this project does not implement."""


def printable(text: str) -> str:
    """A text with whatever a terminal could take for a command escaped, cut where it is too long for a sentence."""
    text = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown(value: object) -> str:
    """A value as a message quotes it: whatever it is, no longer than a line."""
    if isinstance(value, int) and abs(value) >= 10**40:  # Python refuses to write one of some thousand digits
        return "a whole number of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
