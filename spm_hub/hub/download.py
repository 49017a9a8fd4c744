"""Downloads one file into the Hub's cache, resuming where an earlier attempt ended.

The bytes are verified before they enter the cache. The Hub's client resumes downloads only within one process, and
checks a file's size but not its hash.
"""

import hashlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock
from httpx2 import ConnectError, ConnectTimeout, TransportError
from huggingface_hub import (
    ModelInfo,
    constants,
    errors,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.file_download import HfFileMetadata, repo_folder_name

# Documented as public, but not re-exported by name.
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from spm_hub.errors import HubError, TooLargeError, UsageError
from spm_hub.io.environment import SIZE_VARIABLE
from spm_hub.io.hub_client import SECONDS_TO_REACH_THE_HUB, TRIES, pause_after, retry
from spm_hub.io.progress import ProgressCallback

_ETAG = re.compile(r"[\w.-]{1,128}")
_MEGABYTE = 2**20
_UNASKED = 512
"""Megabytes: all layers of SDXL at rank 32 are 400, and a stranger may truthfully say 60 GB."""


def largest_without_consent() -> int:
    """Return the bytes of the largest eraser that is downloaded without a question.

    It is the environment variable's number of megabytes, or 512. Raises UsageError if that is no number.
    """
    said = os.environ.get(SIZE_VARIABLE, "").strip() or str(_UNASKED)
    if not said.isdecimal():
        raise UsageError(
            f"{SIZE_VARIABLE} is {said!r}; it is a number of megabytes", mend=f"{SIZE_VARIABLE}={_UNASKED}"
        )
    return int(said) * _MEGABYTE


def check_size(repo: str, name: str, size: int | None, allowed: int) -> None:
    """Raise TooLargeError for a file of more than `allowed` bytes; None is an unknown size."""
    if size is not None and size > allowed:
        raise TooLargeError(
            f"{repo}: {name} has {size / _MEGABYTE:,.1f} MB, more than the {allowed / _MEGABYTE:,.1f} MB that are "
            "downloaded without a question; nothing was downloaded",
            mend=f"if you want it: spmhub pull {repo} --yes; {SIZE_VARIABLE}=MB is another limit",
        )


def announced_size(repo: str, info: ModelInfo, weights: str, stated: int | None) -> int | None:
    """Return the size of a file in bytes, by the Hub or else by the manifest; None if unknown.

    Raises HubError if they differ.
    """
    size = next((sibling.size for sibling in info.siblings or () if sibling.rfilename == weights), None)
    if None not in (size, stated) and size != stated:
        raise HubError(
            f"{repo}: its manifest says increment.bytes {stated}, but {weights} has {size}",
            mend="report it to the author",
        )
    known = stated if size is None else size
    return known if known is not None else _metadata(hf_hub_url(repo, weights, revision=info.sha)).size


def fetch(
    repo: str,
    name: str,
    commit: str,
    *,
    sha256: str | None = None,
    largest: int | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Return the path of the file `name` of a commit in the cache, downloading it if needed.

    sha256: the hash that the file must have. largest: its largest size in bytes.
    progress: called with the bytes done and the total.
    Only verified bytes enter the cache. Raises HubError for other bytes and for an invalid file name, and the errors
    of the Hub's client.
    """
    if not all(part.strip(".") for part in name.split("/")):
        raise HubError(
            f"{repo}: {name[:200]!r} is not a valid file name in a repository", mend="report it to the author"
        )
    cached = try_to_load_from_cache(repo, name, revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    url = hf_hub_url(repo, name, revision=commit)
    about = _metadata(url)
    if _too_large(about.size, largest):  # one answer may have been altered on the way
        about = _metadata(url)
    if _too_large(about.size, largest):
        raise HubError(f"{repo}: {name} has {about.size} bytes, more than the limit of {largest}")
    if about.etag is None or not _ETAG.fullmatch(about.etag):
        raise HubError(f"{repo}: the Hub sends no hash of {name} (its ETag is {about.etag!r})", mend=_LATER)
    folder = repo_folder_name(repo_id=repo, repo_type="model")
    blob = Path(constants.HF_HUB_CACHE) / folder / "blobs" / about.etag
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / folder / f"{about.etag}.lock"
    for place in (blob, lock):
        place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if not blob.exists():
            partial = blob.with_name(f"{about.etag}.spmhub.incomplete")
            for attempt in range(2):
                size = about.size if attempt == 0 else _metadata(url).size
                try:
                    _download(url, partial, size, largest, progress)
                    wrong = _mismatch(partial, about.etag, sha256)
                except _SizeError as error:
                    wrong = str(error)
                if wrong is None:
                    break
                partial.unlink(missing_ok=True)
                # Once more from the beginning: the bytes, or the metadata, may have been altered on the way.
                if attempt:
                    raise HubError(f"{repo}: {name} of commit {commit} was rejected: {wrong}", mend=_LATER)
            os.replace(partial, blob)
    # The bytes are in the cache; this call links the file name to them, after one more request that may also fail.
    return Path(retry(lambda: hf_hub_download(repo, name, revision=commit)))


_LATER = "run it again; if it fails again, report it to the author"


class _SizeError(Exception):
    """The response has another length than the Hub announced."""


def _too_large(size: int | None, largest: int | None) -> bool:
    return size is not None and largest is not None and size > largest


def _metadata(url: str) -> HfFileMetadata:
    return retry(lambda: get_hf_file_metadata(url, timeout=SECONDS_TO_REACH_THE_HUB))


def _download(
    url: str, partial: Path, size: int | None, largest: int | None, progress: ProgressCallback | None
) -> None:
    """Append to `partial` until it has `size` bytes, resuming at its end.

    Raises the last error after TRIES attempts in a row that brought no byte.
    """
    attempt = 0
    while True:
        have = partial.stat().st_size if partial.exists() else 0
        if have and (size is None or have > size):
            partial.unlink()
            have = 0
        if have == size:
            return
        try:
            _stream(url, partial, have, size, largest, progress)
            if size is None or partial.stat().st_size >= size:
                return
            broken: Exception = TransportError(f"{partial.stat().st_size} of {size} bytes came")
        except (ConnectError, ConnectTimeout):
            raise
        except (TransportError, errors.HfHubHTTPError) as error:
            broken = error
        grown = (partial.stat().st_size if partial.exists() else 0) > have
        attempt = 0 if grown else attempt + 1
        pause = pause_after(broken, attempt)
        if pause is None or attempt == TRIES:
            raise broken
        time.sleep(pause)


def _stream(
    url: str, partial: Path, have: int, size: int | None, largest: int | None, progress: ProgressCallback | None
) -> None:
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        if response.status_code == 416:
            raise _SizeError(f"{size} bytes were announced, but the file ends at byte {have}")
        hf_raise_for_status(response)
        total = _total_length(response.status_code, response.headers)
        if total is not None and size is not None and total != size:
            raise _SizeError(f"{size} bytes were announced, then {total}")
        limit = size if size is not None else largest
        # Status 200 to a range request means that the server sends the whole file.
        with open(partial, "ab" if response.status_code == 206 else "wb") as file:
            # Without a block size every received byte is written, so that a broken connection loses none.
            for block in response.iter_bytes():
                file.write(block)
                if limit is not None and file.tell() > limit:
                    raise _SizeError(f"more than the announced {limit} bytes were sent")
                if progress is not None:
                    progress(file.tell(), limit or file.tell())


def _total_length(status: int, headers: Mapping[str, str]) -> int | None:
    """Return the length of the whole file, by the headers of the response to a GET.

    None if they do not contain it, or the body is compressed.
    """
    if headers.get("Content-Encoding", "identity") != "identity":
        return None
    said = headers.get("Content-Range", "").rpartition("/")[2] if status == 206 else headers.get("Content-Length", "")
    return int(said) if said.isdecimal() else None


def _mismatch(file: Path, etag: str, sha256: str | None) -> str | None:
    """Return a description of a hash mismatch, or None if the file is right.

    The Hub's ETag is the sha256 of a large file and the git blob hash (sha1) of a small one.
    """
    size = file.stat().st_size
    whole, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with open(file, "rb") as content:
        while block := content.read(2**20):
            whole.update(block)
            git.update(block)
    found = git.hexdigest() if len(etag) == 40 else whole.hexdigest()
    if len(etag) in (40, 64) and found != etag:
        return f"its bytes were altered on the way: the Hub announced hash {etag}, received was {found}"
    if sha256 is not None and whole.hexdigest() != sha256:
        return f"its manifest says increment.sha256 {sha256}, received was {whole.hexdigest()}"
    return None
