"""Models of judges by their name: a folder, or owner/name[@revision] on the Hub, pinned to a commit."""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from spm_hub.errors import NotFoundError, UsageError
from spm_hub.evaluation.metrics.metric import About
from spm_hub.io.hashing import sha256_of
from spm_hub.io.hub_client import retry, translate_errors

_NAME = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""transformers reads the second kind by weights_only, which builds tensors and nothing else."""


def model_folder(text: str, metric: str) -> tuple[Path, About]:
    """Return the folder of a model, downloaded if need be, and its commit or hash.

    metric: the name of the metric that needs it, for messages. The facts have the model's name, "model", for the key of
    the metric: of a folder its own name alone, as no path of this machine belongs into a report.
    Raises NotFoundError for a folder without a configuration, UsageError for another text, HubError, NetworkError.
    """
    path = Path(text)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise NotFoundError(f"{path} has no config.json, so it is no model", mend=f"{metric}:FOLDER of a model")
        return path, {"model": path.name, "weights": folder_hash(path)}
    match = _NAME.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{metric}:{text} is neither a folder nor owner/name@revision",
            mend=f"{metric}:openai/clip-vit-base-patch32",
        )
    repo, revision = match["repo"], match["revision"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        folder = _downloaded(repo, revision, metric)
    return folder, {"model": repo, "commit": folder.name}


def _downloaded(repo: str, revision: str | None, metric: str) -> Path:
    with translate_errors(repo, revision, otherwise=f"name a folder of this machine: {metric}:FOLDER"):
        for pattern in _WEIGHTS:
            wanted = [*_SMALL, pattern]
            folder = Path(retry(partial(snapshot_download, repo, revision=revision, allow_patterns=wanted)))
            if any(folder.glob(pattern)):
                return folder
    raise NotFoundError(f"{repo} has no weights that can be read", mend=f"{metric}:OWNER/NAME of another model")


def folder_hash(folder: Path) -> str:
    """Return one sha256 of the weights and configurations in a folder."""
    files = sorted(path for pattern in (*_SMALL, *_WEIGHTS) for path in folder.glob(pattern))
    return hashlib.sha256(json.dumps([[path.name, sha256_of(path)] for path in files]).encode()).hexdigest()
