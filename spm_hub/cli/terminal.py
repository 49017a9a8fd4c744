"""Prepares the process for terminals, pipes and locales that cannot encode every character."""

from __future__ import annotations

import os
import sys
from typing import Any

from spm_hub.io.untrusted_text import escape_hidden

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


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


def printable(text: str, stream: Any) -> str:
    """Return `text` as `stream` will show it: controls, and characters that it lacks, are escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return escape_hidden(text).encode(encoding, "backslashreplace").decode(encoding, "replace")


def speaks_unicode(stream: Any) -> bool:
    """Return True if the stream's encoding has every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
