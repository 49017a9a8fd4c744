"""The names of environment variables, and the user's folders; light, for the command line's help."""

import os
import sys
from pathlib import Path
from typing import Literal

REGISTRY_VARIABLE = "SPMHUB_REGISTRY"
"""The registry to use if no --registry is given; empty for none."""

KEY_VARIABLE = "SPMHUB_REQUIRE_SIGNATURE"
"""A public key: only erasers signed with its private key are used; empty for no check."""

OWNER_VARIABLE = "SPMHUB_OWNER"
"""The Hub user whose repositories are asked for a name that no registry has; empty for none."""

SIZE_VARIABLE = "SPMHUB_LARGEST_DOWNLOAD"
"""Megabytes (2**20 bytes) of the largest eraser that is downloaded without a question."""

_APP = "spm-hub"


def user_folder(kind: Literal["data", "cache"]) -> Path:
    """Return spm-hub's folder for data or for its cache, which may not exist yet.

    Programs that use gates alone need not have platformdirs installed: without it the folder is the system's usual one.
    """
    try:
        import platformdirs
    except ModuleNotFoundError:
        return usual_folder(kind)
    named = platformdirs.user_data_path if kind == "data" else platformdirs.user_cache_path
    return named(_APP, appauthor=False)


def usual_folder(kind: Literal["data", "cache"]) -> Path:
    """Return the folder where this system's programs keep their data or caches."""
    home = Path.home()
    if sys.platform == "win32":
        local = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / _APP
        return local if kind == "data" else local / "Cache"
    variable, inside = ("XDG_DATA_HOME", ".local/share") if kind == "data" else ("XDG_CACHE_HOME", ".cache")
    if sys.platform == "darwin":
        inside = "Library/Application Support" if kind == "data" else "Library/Caches"
    given = os.environ.get(variable, "").strip()
    return (Path(given) if os.path.isabs(given) else home / inside) / _APP
