"""The hash that identifies files: in manifests and lock files, on the Hub, on sites for checkpoints."""

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Return the hash of the whole file in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
