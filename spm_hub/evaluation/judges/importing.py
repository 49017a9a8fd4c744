"""Imports a function of the user's by MODULE:FUNCTION, also from the working folder."""

from __future__ import annotations

import importlib
import os
import sys

from spm_hub.errors import UsageError
from spm_hub.evaluation.attacks import Judge


def import_judge(reference: str) -> Judge:
    """Import the judge "package.module:function", also from the working folder. Raises UsageError."""
    module, colon, name = reference.partition(":")
    # A console script, unlike `python -m`, does not have the working folder on sys.path.
    sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name) if module and colon and name else None
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"--judge {reference}: {error}", mend="--judge PACKAGE.MODULE:FUNCTION") from None
    finally:
        sys.path.pop()
    if not callable(found):
        raise UsageError(f"--judge {reference!r} is not PACKAGE.MODULE:FUNCTION", mend="--judge my.judges:nude")
    judge: Judge = found
    return judge
