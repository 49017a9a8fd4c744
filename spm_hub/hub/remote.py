"""Adapters from the Hugging Face Hub, at a pinned revision."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi, constants, errors, hf_hub_download

from spm_hub.errors import NetworkError, NotFoundError, UsageError
from spm_hub.hub.registry import MANIFEST_NAME, WEIGHTS_NAME, Entry

SECONDS_TO_REACH_THE_HUB = 10.0

_COMMIT = re.compile(r"[0-9a-f]{40}")


def download(repo: str, revision: str | None = None) -> Entry:
    """The adapter of a repository, and its manifest where it has one, both of one commit.

    A commit that is in the cache is taken from there without a request; so is anything while the Hub is out of reach.
    Raises NotFoundError, UsageError when the repository holds several adapters, NetworkError.
    """
    if revision is not None and _COMMIT.fullmatch(revision) and (entry := _cached(repo, revision)):
        return entry
    try:
        # One request without retries, before the downloads themselves would retry for half a minute.
        with _reaching(repo, revision):
            if constants.is_offline_mode():
                raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
            info = HfApi().model_info(repo, revision=revision, timeout=SECONDS_TO_REACH_THE_HUB)
    except NetworkError:
        if entry := _cached(repo, revision):
            return entry
        raise
    files = [sibling.rfilename for sibling in info.siblings or ()]
    weights = _choose(repo, files)
    with _reaching(repo, revision):
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


@contextmanager
def _reaching(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into our errors."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise NotFoundError(
            f"the authors of {repo} ask you to accept their terms first",
            mend=f"accept them at https://huggingface.co/{repo}, then: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(f"{repo} has no revision {revision!r} on the Hub") from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(f"there is no {repo} on the Hub, or it is private", mend="hf auth login") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{repo!r} is no valid name of a Hub repository: {error}") from error
    except (OSError, HTTPError) as error:
        raise NetworkError(
            f"{repo} is not in the cache and the Hub cannot be reached ({error})".splitlines()[0],
            mend=f"connect to a network and run it again, or once with one: hf download {repo}",
        ) from error
