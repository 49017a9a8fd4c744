"""An eraser as a repository of the Hub: its files and model card, shown or uploaded in one commit."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path

from httpx2 import HTTPError, TransportError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import HubError, UsageError
from spm_hub.hub.card import Pair, picture_names, render
from spm_hub.io.hashing import sha256_of
from spm_hub.io.hub_client import legible, patiently, reaching
from spm_hub.io.safetensors_file import MANIFEST_KEY, read_header
from spm_hub.registry import signing
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME, EraserEntry
from spm_hub.registry.registry import HUB_REFERENCE

CARD_NAME = "README.md"


@dataclass(frozen=True)
class Release:
    """What a push puts into the repository: content by path, or the file on this disk that holds it."""

    repo: str
    manifest: Manifest
    card: str
    files: Mapping[str, bytes | Path]

    def listing(self) -> list[dict[str, str | int]]:
        """Path, bytes and sha256 of each file."""
        rows: list[dict[str, str | int]] = []
        for path, content in self.files.items():
            if isinstance(content, Path):
                size, digest = content.stat().st_size, sha256_of(content)
            else:
                size, digest = len(content), hashlib.sha256(content).hexdigest()
            rows.append({"path": path, "bytes": size, "sha256": digest})
        return rows


@dataclass(frozen=True)
class Pushed:
    """Where a push has gone; `pull_request` is its address where one was opened."""

    commit: str
    url: str
    pull_request: str | None


def prepare(entry: EraserEntry, repo: str, pairs: Sequence[Pair], staging: Path) -> Release:
    """Everything that a push of `entry` uploads. An eraser in another program's layout is written anew into `staging`.

    The adapter file is uploaded as it is, bit for bit, under the name that its kind of loader looks for.
    Raises AdapterFileError, ManifestError when it is not what its manifest says.
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
    card = render(manifest, repo, weights, pairs)
    files: dict[str, bytes | Path] = {
        weights: path,
        MANIFEST_NAME: manifest.to_json().encode(),
        CARD_NAME: card.encode(),
    }
    if path == entry.adapter_path and entry.signature_path is not None:
        files[signing.SIGNATURE_NAME] = signing.read(entry.signature_path)
    for index, pair in enumerate(pairs):
        files |= dict(zip(picture_names(index), (pair.without, pair.with_), strict=True))
    return Release(repo, manifest, card, files)


def check_repo(repo: str) -> None:
    """Raises UsageError for what is no owner/name."""
    match = HUB_REFERENCE.fullmatch(repo)
    if match is None or match["revision"] is not None:
        raise UsageError(f"{repo!r} is not of the form owner/name", mend="spmhub push NAME OWNER/NAME")


def push(release: Release, *, private: bool = False, revision: str | None = None, pull_request: bool = False) -> Pushed:
    """Upload a release in one commit, on top of what the repository holds now; it is created where there is none.

    revision: a branch, made where there is none. pull_request: propose it instead, to a repository that exists.
    Raises HubError (not logged in, not allowed, changed meanwhile), NetworkError; the repository is then as it was.
    """
    if pull_request and revision is not None:
        raise UsageError("--pr proposes a change to the main branch, but --revision was given too")
    repo, api = release.repo, HfApi()
    otherwise = f"look at it first: spmhub push {release.manifest.name} {repo} --dry-run"
    with reaching(repo, revision, otherwise=otherwise, why="has to be changed"):
        if not pull_request:
            patiently(lambda: api.create_repo(repo, private=private or None, exist_ok=True))
            if revision is not None:
                patiently(lambda: api.create_branch(repo, branch=revision, exist_ok=True))
        before = patiently(lambda: api.model_info(repo, revision=revision))
        if private and before.private is False:
            raise HubError(
                f"{repo} exists and is public", mend=f"make it private first: {api.endpoint}/{repo}/settings"
            )
        stale = _stale(release, [sibling.rfilename for sibling in before.siblings or ()])

        def commit() -> Pushed:
            return _commit(api, release, stale, revision=revision, pull_request=pull_request, parent=before.sha)

        # Asked twice, it would open a second pull request; on a branch the parent commit keeps it from that.
        if pull_request:
            with legible():
                return commit()
        try:
            return patiently(commit)
        except errors.HfHubHTTPError as error:
            # The first attempt may have been heard, and only the answer lost.
            if error.response.status_code == 412 and (made := _already_there(api, release, revision, stale)):
                return made
            raise


def _already_there(api: HfApi, release: Release, revision: str | None, stale: Sequence[str]) -> Pushed | None:
    """The newest commit, if its files are the release's; others that the repository has besides are not asked about."""
    now = patiently(lambda: api.model_info(release.repo, revision=revision, files_metadata=True))
    held = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in now.siblings or ()}
    for path, content in release.files.items():
        whole = content.read_bytes() if isinstance(content, Path) else content
        git = hashlib.sha1(b"blob %d\0" % len(whole) + whole).hexdigest()
        if held.get(path) not in (git, hashlib.sha256(whole).hexdigest()):
            return None
    if now.sha is None or held.keys() & set(stale):
        return None
    return Pushed(now.sha, f"{api.endpoint}/{release.repo}/commit/{now.sha}", None)


def _stale(release: Release, there: Sequence[str]) -> list[str]:
    """What an earlier push of this eraser has put there and this one does not: pictures, a signature, another kind."""
    names = {WEIGHTS_NAME, signing.SIGNATURE_NAME}
    names |= {f"{release.manifest.name}-{kind}.safetensors" for kind in ("dense", "mask")}
    # Without a manifest it is no eraser's repository yet, and such files are somebody's own.
    ours = names if MANIFEST_NAME in there else set()
    return [name for name in there if (name in ours or name.startswith("images/")) and name not in release.files]


def _commit(
    api: HfApi, release: Release, stale: Sequence[str], *, revision: str | None, pull_request: bool, parent: str | None
) -> Pushed:
    adds = [CommitOperationAdd(path, content) for path, content in release.files.items()]
    try:
        made = api.create_commit(
            release.repo,
            [*adds, *(CommitOperationDelete(path) for path in stale)],
            commit_message=f"{release.manifest.name}: an eraser of {release.manifest.concept.target}",
            revision=revision,
            create_pr=pull_request,
            # Whoever changes the repository between our look at it and our commit is not overwritten.
            parent_commit=parent,
        )
    except ValueError as error:
        if isinstance(error, HTTPError | JSONDecodeError | UnicodeDecodeError):
            raise
        if CARD_NAME in str(error):  # the client names what it found wrong with the card
            raise HubError(f"the Hub refuses the model card of {release.repo}: {error}") from error
        raise TransportError(f"its answer is not what the Hub writes: {error}") from error
    except RuntimeError as error:
        # The client wraps what befalls the upload of a large file.
        if isinstance(error.__cause__, HTTPError | OSError):
            raise error.__cause__ from error
        raise
    return Pushed(made.oid, made.commit_url, made.pr_url)
