"""Makes text of strangers harmless to show: it moves no cursor and hides nothing."""

import re
import unicodedata

MOST_SHOWN = 2**14
"""Characters of one value, as JSON, that are shown. Honest recipes have 2,000."""

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of controls, marks without a shape, halves of characters, and separators of lines."""

_BLANK = re.compile(r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\U000e0100-\U000e01ef]")
"""Letters and marks that are drawn as nothing."""


def escape_hidden(text: str) -> str:
    r"""Escape characters that are not seen, as \x1b or \u202e; new lines and tabs stay.

    They move a terminal's cursor, set colours, change the reading order, or make two names look alike.
    """
    if text.isprintable() and not _BLANK.search(text):
        return text
    return "".join(_escaped(one) if _is_hidden(one) else one for one in text)


def escape_hidden_in_json(document: str) -> str:
    """Escape the same characters in a JSON document, which still parses to the same strings."""
    if document.isprintable() and not _BLANK.search(document):
        return document
    return "".join(_in_json(one) if _is_hidden(one) else one for one in document)


def without_hidden(text: str) -> str:
    """Leave out the same characters, and make one line of several."""
    return " ".join("".join(one for one in text if one.isspace() or not _is_hidden(one)).split())


def one_line(text: str) -> str:
    r"""Escape the same characters, and new lines and tabs too, so that a text begins no line of its own."""
    return escape_hidden(text).replace("\n", "\\n").replace("\t", "\\t")


def _is_hidden(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in _HIDDEN or _BLANK.match(character) is not None


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]


def _in_json(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
