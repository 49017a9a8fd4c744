"""Words of messages: commands that can be typed as they are, and numbers with their noun."""

import shlex


def quoted(value: object) -> str:
    """Quote a path, name or text as one word of a shell command, for spaces, quotes and dollar signs."""
    return shlex.quote(str(value))


def counted(number: int, noun: str) -> str:
    """Return "1 picture", "4 pictures", "0 erasers"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
