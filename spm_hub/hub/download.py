"""One file of the Hub into the Hub's own cache: resumed where it broke off, and verified before it is there.

The Hub's client resumes a download within one process only, and takes any bytes of the right number for the file.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock
from httpx2 import ConnectError, ConnectTimeout, TransportError
from huggingface_hub import (
    constants,
    errors,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.file_download import HfFileMetadata, repo_folder_name

# Documented as public, though not re-exported by name.
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from spm_hub.errors import HubError
from spm_hub.io.hub_client import SECONDS_TO_REACH_THE_HUB, TRIES, patiently, pause_after

Progress = Callable[[int, int], None]

_ETAG = re.compile(r"[\w.-]{1,128}")


def fetch(
    repo: str,
    name: str,
    commit: str,
    *,
    sha256: str | None = None,
    largest: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """The file `name` of a commit, from the cache or else downloaded into it.

    `sha256` and `largest` (bytes) are what it has to be, and may be at most. `progress` is told bytes done and in all.
    Only verified bytes enter the cache. Raises HubError for any others and for what is no name of a file, and what the
    Hub's client raises.
    """
    if not all(part.strip(".") for part in name.split("/")):
        raise HubError(f"{repo}: {name[:200]!r} is no name of a file in a repository", mend="tell its author")
    cached = try_to_load_from_cache(repo, name, revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    url = hf_hub_url(repo, name, revision=commit)
    about = _asked(url)
    if _too_large(about.size, largest):
        about = _asked(url)
    if _too_large(about.size, largest):
        raise HubError(f"{repo}: {name} has {about.size} bytes, more than the {largest} that it may have")
    if about.etag is None or not _ETAG.fullmatch(about.etag):
        raise HubError(f"{repo}: the Hub gives no hash of {name} (its ETag is {about.etag!r})", mend=_LATER)
    folder = repo_folder_name(repo_id=repo, repo_type="model")
    blob = Path(constants.HF_HUB_CACHE) / folder / "blobs" / about.etag
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / folder / f"{about.etag}.lock"
    for place in (blob, lock):
        place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if not blob.exists():
            partial = blob.with_name(f"{about.etag}.spmhub.incomplete")
            for attempt in range(2):
                size = about.size if attempt == 0 else _asked(url).size
                try:
                    _download(url, partial, size, largest, progress)
                    wrong = _mismatch(partial, about.etag, sha256)
                except _OtherSizeError as error:
                    wrong = str(error)
                if wrong is None:
                    break
                partial.unlink(missing_ok=True)
                # Once more from the beginning: the bytes, or the answer before them, may have been altered on the way.
                if attempt:
                    raise HubError(f"{repo}: {name} of commit {commit} was not kept: {wrong}", mend=_LATER)
            os.replace(partial, blob)
    # The bytes are there; what it still asks the Hub for is their name, and that connection may break as any other.
    return Path(patiently(lambda: hf_hub_download(repo, name, revision=commit)))


_LATER = "run it again; if it stays so, tell its author"


class _OtherSizeError(Exception):
    """What comes is not as long as was announced before."""


def _too_large(size: int | None, largest: int | None) -> bool:
    return size is not None and largest is not None and size > largest


def _asked(url: str) -> HfFileMetadata:
    return patiently(lambda: get_hf_file_metadata(url, timeout=SECONDS_TO_REACH_THE_HUB))


def _download(url: str, partial: Path, size: int | None, largest: int | None, progress: Progress | None) -> None:
    """Fill `partial` up to `size` bytes, from where it ends; given up after several attempts that brought nothing."""
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
    url: str, partial: Path, have: int, size: int | None, largest: int | None, progress: Progress | None
) -> None:
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        if response.status_code == 416:
            raise _OtherSizeError(f"{size} bytes were announced, and there are none from byte {have} on")
        hf_raise_for_status(response)
        coming = _length(response.status_code, response.headers)
        if coming is not None and size is not None and coming != size:
            raise _OtherSizeError(f"{size} bytes were announced, then {coming}")
        limit = size if size is not None else largest
        # 200 to a range means the whole file from its beginning.
        with open(partial, "ab" if response.status_code == 206 else "wb") as file:
            # As it comes, and not in blocks of a size: what has come is kept when the rest does not.
            for block in response.iter_bytes():
                file.write(block)
                if limit is not None and file.tell() > limit:
                    raise _OtherSizeError(f"more than the announced {limit} bytes came")
                if progress is not None:
                    progress(file.tell(), limit or file.tell())


def _length(status: int, headers: Mapping[str, str]) -> int | None:
    """Of the whole file, by what an answer to a GET says; None where it does not, or says it of a packed body."""
    if headers.get("Content-Encoding", "identity") != "identity":
        return None
    said = headers.get("Content-Range", "").rpartition("/")[2] if status == 206 else headers.get("Content-Length", "")
    return int(said) if said.isdecimal() else None


def _mismatch(file: Path, etag: str, sha256: str | None) -> str | None:
    """What is wrong with the bytes: the Hub names a large file by its sha256, a small one as git does."""
    size = file.stat().st_size
    whole, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with open(file, "rb") as content:
        while block := content.read(2**20):
            whole.update(block)
            git.update(block)
    found = git.hexdigest() if len(etag) == 40 else whole.hexdigest()
    if len(etag) in (40, 64) and found != etag:
        return f"its bytes were altered on their way: the Hub says {etag}, they are {found}"
    if sha256 is not None and whole.hexdigest() != sha256:
        return f"its manifest says increment.sha256 {sha256}, its bytes are {whole.hexdigest()}"
    return None
