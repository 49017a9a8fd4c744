"""The hash that files are known by: in manifests and lock files, on the Hub, and on sites that share checkpoints."""

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Of the whole file, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
