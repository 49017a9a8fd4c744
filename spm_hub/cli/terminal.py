"""Prepares the process for terminals, pipes and locales that cannot encode every character."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks that change the reading order, and bytes that are no text."""


def prepare_streams() -> None:
    """Let stdout and stderr escape the characters that their encoding lacks, so that printing cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def restart_in_utf8() -> None:
    """Start this program again in Python's UTF-8 mode if the locale is plain ASCII, as under LC_ALL=C.

    Python can otherwise neither read words of other scripts from the command line nor open files of such names. The
    encoding of stdin, stdout and stderr stays as it is. Python itself does this for LC_ALL=C, unless PYTHONUTF8=0.
    """
    if sys.getfilesystemencoding().lower() not in ("ascii", "us-ascii", "ansi_x3.4-1968") or not sys.executable:
        return
    encoding = f"{sys.stdout.encoding if sys.stdout else 'ascii'}:backslashreplace"
    environment = {**os.environ, "PYTHONUTF8": "1"}
    environment.setdefault("PYTHONIOENCODING", encoding)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def escape_controls(text: str) -> str:
    """Escape characters that move a terminal's cursor, set colours or change the reading order.

    Text in somebody else's manifest cannot manipulate the terminal.
    """
    return _CONTROLS.sub(_escaped, text)


def escape_controls_in_json(text: str) -> str:
    """Escape the same characters in a JSON document, which still parses to the same strings."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def printable(text: str, stream: Any) -> str:
    """Return `text` as `stream` will show it: controls, and characters that it lacks, are escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return escape_controls(text).encode(encoding, "backslashreplace").decode(encoding, "replace")


def speaks_unicode(stream: Any) -> bool:
    """Return True if the stream's encoding has every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]
