"""Prepares an eraser's files and model card for the Hub and uploads them in one commit."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from httpx2 import HTTPError, TransportError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, errors
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)

from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import HubError, UsageError
from spm_hub.hub.card import PicturePair, is_explicit, picture_names, render
from spm_hub.io.hashing import sha256_of
from spm_hub.io.hub_client import SECONDS_TO_REACH_THE_HUB, reject_malformed_answers, retry, translate_errors
from spm_hub.io.safetensors_file import MANIFEST_KEY, read_header
from spm_hub.registry import signing
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME, EraserEntry
from spm_hub.registry.registry import HUB_REFERENCE

CARD_NAME = "README.md"


@dataclass(frozen=True)
class Release:
    """Everything that a push uploads; `files` maps each path to its content or to a local file."""

    repo: str
    manifest: Manifest
    card: str
    files: Mapping[str, bytes | Path]

    def listing(self) -> list[dict[str, str | int]]:
        """Return path, bytes and sha256 of each file."""
        rows: list[dict[str, str | int]] = []
        for path, content in self.files.items():
            if isinstance(content, Path):
                size, digest = content.stat().st_size, sha256_of(content)
            else:
                size, digest = len(content), hashlib.sha256(content).hexdigest()
            rows.append({"path": path, "bytes": size, "sha256": digest})
        return rows


@dataclass(frozen=True)
class PushResult:
    """Commit and address of a push; `pull_request` is the address of the pull request, if it opened one."""

    commit: str
    url: str
    pull_request: str | None


def prepare(entry: EraserEntry, repo: str, pairs: Sequence[PicturePair], staging: Path) -> Release:
    """Collect everything that a push of `entry` to `repo` uploads.

    The adapter file is uploaded bit for bit, a low-rank one under the name that diffusers looks for. An eraser in
    another program's layout is first saved in ours, in the folder `staging`. Of an eraser of an explicit concept, such
    as nudity, only pictures on which it acted are uploaded, never those without it.
    Raises UsageError for an invalid `repo`; AdapterFileError or ManifestError if the file does not match its manifest.
    """
    check_repo(repo)
    adapter = entry.load()
    path, manifest = entry.adapter_path, adapter.manifest
    if MANIFEST_KEY not in read_header(path).metadata or manifest.increment.sha256 is None:
        path = staging / f"{manifest.name}.safetensors"
        manifest = adapter.save(path)
    kind = manifest.increment.kind
    weights = WEIGHTS_NAME if kind == "low_rank" else f"{manifest.name}-{kind}.safetensors"
    info = manifest.increment.model_copy(update={"file": weights})
    manifest = manifest.model_copy(update={"increment": info, "origin": None})
    if is_explicit(manifest.concept):
        pairs = [replace(pair, without=None) for pair in pairs if max(pair.gates.values(), default=0.0) >= 0.5]
    card = render(manifest, repo, weights, pairs)
    files: dict[str, bytes | Path] = {
        weights: path,
        MANIFEST_NAME: manifest.to_json().encode(),
        CARD_NAME: card.encode(),
    }
    if path == entry.adapter_path and entry.signature_path is not None:
        files[signing.SIGNATURE_NAME] = signing.read(entry.signature_path)
    for index, pair in enumerate(pairs):
        both = zip(picture_names(index), (pair.without, pair.with_), strict=True)
        files |= {name: content for name, content in both if content is not None}
    return Release(repo, manifest, card, files)


def check_repo(repo: str) -> None:
    """Refuse a repository that is not owner/name, or whose name the Hub does not allow.

    Raises UsageError.
    """
    match = HUB_REFERENCE.fullmatch(repo)
    if match is None or match["revision"] is not None:
        raise UsageError(f"{repo!r} is not of the form owner/name", mend="spmhub push NAME OWNER/NAME")
    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise UsageError(f"{repo!r} is no name for a repository on the Hub: {error}") from error


def check_access(repo: str, *, private: bool = False, pull_request: bool = False) -> None:
    """Refuse, before any work, a push that the Hub would refuse.

    There is no login, its token may only read, or the repository is of another owner.

    Raises UsageError, HubError, HubNotFoundError for a pull request to no repository, NetworkError.
    """
    check_repo(repo)
    api, owner = HfApi(), repo.partition("/")[0]
    with translate_errors(repo, None, otherwise="add --dry-run", why="is to be changed"):
        account = retry(lambda: _account(api))
        try:
            there: ModelInfo | None = retry(lambda: api.model_info(repo))
        except errors.RepositoryNotFoundError:
            if pull_request:
                raise
            there = None
    if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise HubError("the token of your login may only read", mend="hf auth login, with a token that may write")
    mine = [str(one.get("name")) for one in (account, *(account.get("orgs") or ()))]
    if not pull_request and owner.casefold() not in (name.casefold() for name in mine):
        name = repo.partition("/")[2]
        raise HubError(
            f"your login, {mine[0]}, may not write to {repo}",
            mend=f"spmhub push NAME {mine[0]}/{name}" + (", or add --pr" if there is not None else ""),
        )
    if private and there is not None and not pull_request:
        _refuse_public(api, repo, there)


def _refuse_public(api: HfApi, repo: str, there: ModelInfo) -> None:
    if there.private is False:
        raise HubError(f"{repo} exists and is public", mend=f"make it private first: {api.endpoint}/{repo}/settings")


def _account(api: HfApi) -> dict[str, Any]:
    """Return the account of the login, as the Hub describes it.

    The client's own `whoami` does not ask the Hub without a token.
    """
    response = get_session().get(
        f"{api.endpoint}/api/whoami-v2", headers=build_hf_headers(), timeout=SECONDS_TO_REACH_THE_HUB
    )
    hf_raise_for_status(response)
    answer = response.json()
    if not isinstance(answer, dict):
        raise TransportError("its answer is not what the Hub writes")
    return answer


def push(
    release: Release, *, private: bool = False, revision: str | None = None, pull_request: bool = False
) -> PushResult:
    """Upload a release in one commit, on top of the repository's newest one.

    A repository or branch that does not exist is created.
    revision: the branch; default: main. pull_request: open a pull request instead; the repository must exist.
    Raises HubError (not logged in, not allowed, changed meanwhile), NetworkError; the repository is unchanged then.
    """
    if pull_request and revision is not None:
        raise UsageError("--pr opens a pull request to the main branch, so --revision cannot be used with it")
    repo, api = release.repo, HfApi()
    otherwise = f"look at it first: spmhub push {release.manifest.name} {repo} --dry-run"
    with translate_errors(repo, revision, otherwise=otherwise, why="is to be changed"):
        if not pull_request:
            retry(lambda: api.create_repo(repo, private=private or None, exist_ok=True))
            if revision is not None:
                retry(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
        before = retry(lambda: api.model_info(repo, revision=revision))
        if private:
            _refuse_public(api, repo, before)
        stale = _stale_files(release, [sibling.rfilename for sibling in before.siblings or ()])

        def commit() -> PushResult:
            return _commit(api, release, stale, revision=revision, pull_request=pull_request, parent=before.sha)

        # No retry: it could open a second pull request. On a branch the parent commit prevents a second commit.
        if pull_request:
            with reject_malformed_answers():
                return commit()
        try:
            return retry(commit)
        except errors.HfHubHTTPError as error:
            # The first attempt may have succeeded with only its response lost.
            if error.response.status_code == 412 and (made := _find_commit(api, release, revision, stale)):
                return made
            raise


def _find_commit(api: HfApi, release: Release, revision: str | None, stale: Sequence[str]) -> PushResult | None:
    """Return the newest commit if it has all files of the release and none of `stale`, else None.

    Other files in the repository do not matter.
    """
    now = retry(lambda: api.model_info(release.repo, revision=revision, files_metadata=True))
    hashes = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in now.siblings or ()}
    for path, content in release.files.items():
        whole = content.read_bytes() if isinstance(content, Path) else content
        git = hashlib.sha1(b"blob %d\0" % len(whole) + whole).hexdigest()
        if hashes.get(path) not in (git, hashlib.sha256(whole).hexdigest()):
            return None
    if now.sha is None or hashes.keys() & set(stale):
        return None
    return PushResult(now.sha, f"{api.endpoint}/{release.repo}/commit/{now.sha}", None)


def _stale_files(release: Release, existing: Sequence[str]) -> list[str]:
    """Return the files of an earlier push that this release does not replace, and that are to be deleted.

    These are pictures, a signature, or weights of another kind.
    """
    names = {WEIGHTS_NAME, signing.SIGNATURE_NAME}
    names |= {f"{release.manifest.name}-{kind}.safetensors" for kind in ("dense", "mask")}
    # Without a manifest the repository has no eraser yet, and such files belong to the user.
    ours = names if MANIFEST_NAME in existing else set()
    return [name for name in existing if (name in ours or name.startswith("images/")) and name not in release.files]


def _commit(
    api: HfApi, release: Release, stale: Sequence[str], *, revision: str | None, pull_request: bool, parent: str | None
) -> PushResult:
    adds = [CommitOperationAdd(path, content) for path, content in release.files.items()]
    try:
        made = api.create_commit(
            release.repo,
            [*adds, *(CommitOperationDelete(path) for path in stale)],
            commit_message=f"{release.manifest.name}: an eraser of {release.manifest.concept.target}",
            revision=revision,
            create_pr=pull_request,
            # Fail, rather than overwrite, if somebody changed the repository since we read it.
            parent_commit=parent,
        )
    except ValueError as error:
        if isinstance(error, HTTPError | JSONDecodeError | UnicodeDecodeError):
            raise
        if CARD_NAME in str(error):  # the client says what is invalid in the card
            raise HubError(f"the Hub refuses the model card of {release.repo}: {error}") from error
        raise TransportError(f"its answer is not what the Hub writes: {error}") from error
    except RuntimeError as error:
        # The client wraps errors in the upload of a large file.
        if isinstance(error.__cause__, HTTPError | OSError):
            raise error.__cause__ from error
        raise
    return PushResult(made.oid, made.commit_url, made.pr_url)
