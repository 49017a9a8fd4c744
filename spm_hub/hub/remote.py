"""Adapters from the Hugging Face Hub, at a pinned revision."""

from pathlib import Path

from huggingface_hub import errors, hf_hub_download

from spm_hub.errors import NetworkError, NotFoundError, UsageError
from spm_hub.hub.registry import MANIFEST_NAME, WEIGHTS_NAME, Entry
from spm_hub.network import is_commit, reaching, repository_info


def download(repo: str, revision: str | None = None) -> Entry:
    """The adapter of a repository, and its manifest where it has one, both of one commit.

    A commit that is in the cache is taken from there without a request; so is anything while the Hub is out of reach.
    Raises NotFoundError, UsageError when the repository holds several adapters, NetworkError.
    """
    if is_commit(revision) and (entry := _cached(repo, revision)):
        return entry
    otherwise = f"once with one: hf download {repo}"
    try:
        info = repository_info(repo, revision, otherwise=otherwise)
    except NetworkError:
        if entry := _cached(repo, revision):
            return entry
        raise
    files = [sibling.rfilename for sibling in info.siblings or ()]
    weights = _choose(repo, files)
    with reaching(repo, revision, otherwise=otherwise):
        # By the revision as it was named, so that the cache knows it by that name when there is no network.
        path = Path(hf_hub_download(repo, weights, revision=revision))
        commit = path.parents[weights.count("/")].name
        manifest = Path(hf_hub_download(repo, MANIFEST_NAME, revision=commit)) if MANIFEST_NAME in files else None
    return Entry(repo, path, manifest)


def _choose(repo: str, files: list[str]) -> str:
    found = [WEIGHTS_NAME] if WEIGHTS_NAME in files else [file for file in files if file.endswith(".safetensors")]
    if not found:
        raise NotFoundError(f"{repo} holds no safetensors file, so no adapter", mend="spmhub list")
    if len(found) > 1:
        raise UsageError(
            f"{repo} holds no {WEIGHTS_NAME} but several others: {', '.join(found[:5])}",
            mend=f"hf download {repo} {found[0]} --local-dir . and give its path",
        )
    return found[0]


def _cached(repo: str, revision: str | None) -> Entry | None:
    """The adapter from the cache, when the repository has been downloaded before; no request is made."""
    try:
        weights = Path(hf_hub_download(repo, WEIGHTS_NAME, revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
    manifest = weights.with_name(MANIFEST_NAME)
    return Entry(repo, weights, manifest if manifest.is_file() else None)
