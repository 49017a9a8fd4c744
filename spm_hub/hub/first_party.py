"""Decides whether, and in which repository, a bare name is looked up. Imports no Hub client."""

import os
from collections.abc import Mapping

from spm_hub.adapters.manifest import plain_name
from spm_hub.io.environment import OWNER_VARIABLE

DEFAULT_OWNER = "spm-hub"
"""The account that `--pull` looks names up in if the user has configured none."""

FIRST_PARTY: Mapping[str, str] = {}
"""Names that stand for repositories of ours wherever they are typed, with these repositories; none is published yet."""


def repository_of(name: str, *, pull: bool = False) -> str | None:
    """Return the repository to look an eraser of this name up in; None if the Hub is not asked.

    That is one of the account in the environment variable, which turns this off where it is empty; else that of the
    list of first-party names; else, if the user asked for it by `pull`, one of `DEFAULT_OWNER`.
    """
    configured, plain = os.environ.get(OWNER_VARIABLE), plain_name(name)
    if configured is not None and configured.strip():
        return f"{configured.strip()}/{plain}"
    if configured is None and plain in FIRST_PARTY:
        return FIRST_PARTY[plain]
    return f"{DEFAULT_OWNER}/{plain}" if pull else None
