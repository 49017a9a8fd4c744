"""Talks to the Hugging Face Hub: repeats requests that a busy Hub refused, and raises our own errors."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from httpx2 import ConnectError, ConnectTimeout, HTTPError, TransportError
from huggingface_hub import HfApi, ModelInfo, constants, errors
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

from spm_hub.errors import HubError, HubNotFoundError, NetworkError, UsageError

SECONDS_TO_REACH_THE_HUB = 10.0
TRIES = 4
LONGEST_PAUSE = 30.0
"""Seconds. If the Hub asks for a longer pause, the command reports it instead of waiting."""

_FIRST_PAUSE = 1.0
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_COMMIT = re.compile(r"[0-9a-f]{40}")

T = TypeVar("T")


def is_commit(revision: str | None) -> bool:
    """Return True if `revision` names a commit, whose files never change; branches and tags move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def repository_info(repo: str, revision: str | None, *, otherwise: str, files: bool = False) -> ModelInfo:
    """Return the Hub's facts about a model repository; with sizes and hashes of its files if `files`.

    Raises as `translate_errors` does; NetworkError also if HF_HUB_OFFLINE is set.
    """
    with translate_errors(repo, revision, otherwise=otherwise):
        return retry(
            lambda: HfApi().model_info(repo, revision=revision, timeout=SECONDS_TO_REACH_THE_HUB, files_metadata=files)
        )


@contextmanager
def reject_malformed_answers() -> Iterator[None]:
    """Turn the client's errors about a malformed answer into a TransportError.

    An answer is malformed if it was cut short, altered, or comes from another server.
    """
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise TransportError(f"its answer is not what the Hub writes: {type(error).__name__}: {error}"[:200]) from error


def reach() -> None:
    """Connect to the Hub once, whatever it answers, as the client's lists would try for half a minute.

    Raises ConnectionError without a network.
    """
    with suppress(TransportError):
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_REACH_THE_HUB)
        except (ConnectError, ConnectTimeout) as error:
            raise ConnectionError(str(error)) from error


def retry(ask: Callable[[], T]) -> T:
    """Return `ask()`, repeated after a pause if the Hub was busy or a connection broke: four times in all.

    If no connection can be made, it is not repeated: a user without a network should see it at once.
    """
    for attempt in range(TRIES):
        try:
            with reject_malformed_answers():
                return ask()
        except (ConnectError, ConnectTimeout):
            raise
        except (TransportError, errors.HfHubHTTPError) as error:
            pause = pause_after(error, attempt)
            if pause is None or attempt == TRIES - 1:
                raise
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def pause_after(error: Exception, attempt: int) -> float | None:
    """Return the seconds to wait before the next attempt, or None for no further one.

    The pause is the one that the Hub asks for, or doubles with each attempt.
    """
    pause = _FIRST_PAUSE * 2**attempt
    if isinstance(error, errors.HfHubHTTPError):
        if error.response.status_code not in _PASSING:
            return None
        asked = error.response.headers.get("Retry-After", "")
        pause = float(asked) if asked.isdigit() else pause
    return pause if pause <= LONGEST_PAUSE else None


@contextmanager
def translate_errors(
    repo: str, revision: str | None, *, otherwise: str, why: str = "is not in the cache"
) -> Iterator[None]:
    """Turn the errors of the Hub's client inside the block into our own.

    otherwise: advice for a user without a network.  why: the reason that `repo` is needed.
    The Hub is not asked if HF_HUB_OFFLINE is set.
    Raises HubNotFoundError (no such repository, revision or file), HubError (closed to this user, changed meanwhile),
    UsageError (no valid name), NetworkError.
    """
    if constants.is_offline_mode():
        raise NetworkError(
            f"{repo} {why} and the Hub cannot be reached (HF_HUB_OFFLINE is set)",
            mend=f"unset HF_HUB_OFFLINE and run it again, or {otherwise}",
        )
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"the authors of {repo} ask you to accept their terms first",
            mend=f"accept them at {constants.ENDPOINT}/{repo}, then: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubNotFoundError(f"{repo} has no revision {revision or 'main'!r} on the Hub") from error
    except errors.RemoteEntryNotFoundError as error:
        missing = str(error.response.url).rpartition("/")[2]
        raise HubNotFoundError(f"{repo} has no file {missing} at revision {revision or 'main'!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubNotFoundError(f"there is no {repo} on the Hub, or it is private", mend="hf auth login") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{repo!r} is no valid name of a Hub repository: {error}") from error
    except errors.HfHubHTTPError as error:
        raise _refusal(repo, error) from error
    except (OSError, HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NetworkError(
            f"{repo} {why} and the Hub cannot be reached ({reason})",
            mend=f"connect to a network and run it again, or {otherwise}",
        ) from error


def _refusal(repo: str, error: errors.HfHubHTTPError) -> HubError | NetworkError:
    """Return the error for an answer that the Hub's client has no error of its own for."""
    status, reason = error.response.status_code, error.response.reason_phrase
    what = f"{status} {reason}".strip()
    match status:
        case 401:
            return HubError(f"the Hub asks for a login to {repo} ({what})", mend="hf auth login")
        case 403:
            return HubError(
                f"the Hub does not let you do this with {repo} ({what})",
                mend="hf auth whoami, and a token that may: hf auth login",
            )
        case 412:
            return HubError(
                f"somebody has changed {repo} meanwhile ({what}); nothing of yours was put there",
                mend=f"look at {constants.ENDPOINT}/{repo}/commits/main, then run it again",
            )
        case 429:
            wait = error.response.headers.get("Retry-After")
            return NetworkError(
                f"{repo}: the Hub asks for fewer requests ({what})",
                mend=f"run it again in {wait} seconds" if wait else "run it again in some minutes, or: hf auth login",
            )
        case _:
            return NetworkError(
                f"{repo}: the Hub answers {what}", mend="run it again later: https://status.huggingface.co"
            )
