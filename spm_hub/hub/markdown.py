"""Writes text of strangers into Markdown, shell commands and Python code, where it stays text."""

import json
import re

from spm_hub.io.untrusted_text import escape_hidden, without_hidden
from spm_hub.io.wording import quoted

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#|~!])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def prose(text: str) -> str:
    """Return a text as one line of prose: no markup, no link, no picture, no HTML, no new paragraph."""
    line = "".join(_ENTITIES.get(one, one) for one in without_hidden(text))
    line = _SPECIAL.sub(r"\\\1", line).replace("://", "&#58;//")
    return re.sub(r"\b(www)\.", r"\1&#46;", line, flags=re.IGNORECASE)


def code(text: str) -> str:
    """Return a text as code within a line, whatever backticks it has."""
    line = without_hidden(text) or " "
    fence = "`" * (1 + _longest_run(line))
    space = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{fence}{space}{line}{space}{fence}"


def fenced(language: str, text: str) -> str:
    """Return lines as a block of code, fenced by more backticks than it has anywhere."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{escape_hidden(text).rstrip()}\n{fence}"


def in_shell(text: str) -> str:
    """Return a text as one word of a shell command, on one line."""
    return quoted(without_hidden(text))


def in_python(text: str) -> str:
    """Return a text as a Python literal in double quotes, on one line."""
    return json.dumps(without_hidden(text), ensure_ascii=False)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
