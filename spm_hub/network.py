"""The Hugging Face Hub's client, asked once and answered in our own errors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from httpx2 import HTTPError
from huggingface_hub import HfApi, ModelInfo, constants, errors

from spm_hub.errors import NetworkError, NotFoundError, UsageError

SECONDS_TO_REACH_THE_HUB = 10.0

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str | None) -> bool:
    """Whether `revision` names one commit, whose files never change; branches and tags move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def repository_info(repo: str, revision: str | None, *, otherwise: str) -> ModelInfo:
    """What the Hub says of a model repository: one request without retries, where downloads retry for half a minute.

    Raises as `reaching` does; NetworkError also when HF_HUB_OFFLINE is set.
    """
    if constants.is_offline_mode():
        raise NetworkError(
            f"{repo} is not in the cache and the Hub cannot be reached (HF_HUB_OFFLINE is set)",
            mend=f"unset HF_HUB_OFFLINE and run it again, or {otherwise}",
        )
    with reaching(repo, revision, otherwise=otherwise):
        return HfApi().model_info(repo, revision=revision, timeout=SECONDS_TO_REACH_THE_HUB)


@contextmanager
def reaching(repo: str, revision: str | None, *, otherwise: str) -> Iterator[None]:
    """Turns what the Hub's client raises inside into our errors; `otherwise` is what to do without a network.

    Raises NotFoundError (no such repository or revision, or closed to this user), UsageError (no valid name),
    NetworkError.
    """
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
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NetworkError(
            f"{repo} is not in the cache and the Hub cannot be reached ({why})",
            mend=f"connect to a network and run it again, or {otherwise}",
        ) from error
