"""Weights that come in packages of other authors, found by name and hash."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from spm_hub.errors import NotFoundError, UsageError
from spm_hub.io.hashing import sha256_of


def file_of_package(module: str, name: str, sha256: str, install: str) -> Path:
    """Return the path of a file of an installed package.

    module: the package's import name. name: the file's, relative to its folder. install: the command that installs it.
    Raises NotFoundError without the package, UsageError for a file with another hash: its numbers would be others.
    """
    spec = find_spec(module)
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(next(iter(folders))) / name if folders else None
    if path is None or not path.is_file():
        raise NotFoundError(f"the weights come in the package {module}, which is not installed", mend=install)
    if (found := sha256_of(path)) != sha256:
        raise UsageError(
            f"{path} has the sha256 {found}, and numbers are known for {sha256} alone",
            mend=f"{install} --force-reinstall",
        )
    return path
