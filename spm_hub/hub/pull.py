"""Downloads erasers from the Hub at one commit, verifies them and keeps them in a registry."""

import dataclasses
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, errors, hf_hub_download
from huggingface_hub.file_download import repo_folder_name

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import MAX_BYTES, Concept, Manifest, Origin, slug
from spm_hub.errors import HubError, HubNotFoundError, NetworkError, NotFoundError, SpmHubError, UsageError
from spm_hub.hub.changes import Changes, changes_between
from spm_hub.hub.download import announced_size, check_size, fetch, largest_without_consent
from spm_hub.io.atomic import write_atomic
from spm_hub.io.hashing import sha256_of
from spm_hub.io.hub_client import is_commit, repository_info, translate_errors
from spm_hub.io.progress import ProgressCallback
from spm_hub.io.wording import quoted
from spm_hub.registry import lockfile, signing, storage
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME, EraserEntry
from spm_hub.registry.registry import Registry

_SUFFIX = ".safetensors"
_COMPARED = 64
"""How many erasers of the registry a new one is compared with; `spmhub audit` compares all."""


def download(
    repo: str, revision: str | None = None, *, largest: int | None = None, progress: ProgressCallback | None = None
) -> EraserEntry:
    """Download a repository's adapter and manifest, of one commit, into the Hub's cache.

    A commit that is already in the cache needs no request; a cached branch or tag is used if the Hub is out of reach.
    Downloaded files are verified against the hashes of the Hub and of the manifest before they enter the cache.
    largest: bytes that the adapter may have; None is `download.largest_without_consent`.
    Raises HubNotFoundError, HubError, ManifestError, NetworkError; TooLargeError before anything large is downloaded;
    UsageError if the repository has several adapters.
    """
    cached = _cached(repo, revision)
    # A cached adapter without a manifest may come from another program, which did not download the manifest.
    if is_commit(revision) and cached is not None and cached.manifest_path is not None:
        return cached
    otherwise = f"on a machine with one: hf download {repo}"
    try:
        info = repository_info(repo, revision, otherwise=otherwise, files=True)
    except NetworkError:
        if cached is not None:
            return cached
        raise
    commit = info.sha
    if commit is None or not is_commit(commit):
        raise HubError(f"the Hub sends no commit for {repo} at {revision or 'main'} (it sends {commit!r})")
    is_new = _cached(repo, commit) is None
    names = [sibling.rfilename for sibling in info.siblings or ()]
    with translate_errors(repo, revision, otherwise=otherwise):
        manifest_path, manifest = None, None
        if MANIFEST_NAME in names:
            manifest_path = fetch(repo, MANIFEST_NAME, commit, largest=MAX_BYTES)
            manifest = Manifest.read(manifest_path)
        weights = _choose_file(repo, names, manifest)
        stated = None if manifest is None else manifest.increment
        stated_bytes = None if stated is None else stated.bytes
        announced = announced_size(repo, info, weights, stated_bytes)
        allowed = largest_without_consent() if largest is None else largest
        if is_new:
            check_size(repo, weights, announced, allowed)
        # Fetch the signature before the weights: a cached commit with weights is used as it is, signature included.
        if signing.SIGNATURE_NAME in names:
            fetch(repo, signing.SIGNATURE_NAME, commit, largest=signing.MAX_BYTES)
        path = fetch(
            repo,
            weights,
            commit,
            sha256=None if stated is None else stated.sha256,
            largest=min(allowed if announced is None else announced, storage.MAX_BYTES),
            progress=progress,
        )
    _write_ref(repo, revision, commit)
    origin = Origin(repo=repo, commit=commit, revision=_named(revision))
    return EraserEntry(repo, path, manifest_path, origin, is_new, asked=repo)


@dataclass(frozen=True)
class PullResult:
    """The eraser that a pull put into the registry, and whether that changed anything.

    changes: what an update changed, in words.  remarks: what an audit found in a new eraser, in words.
    """

    entry: EraserEntry
    origin: Origin
    state: Literal["new", "updated", "unchanged"]
    changes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def pull(
    repo: str,
    revision: str | None = None,
    *,
    registry: Registry,
    name: str | None = None,
    concept: str | None = None,
    asked: str | None = None,
    pin: lockfile.Pin | None = None,
    replace: bool = False,
    largest: int | None = None,
    progress: ProgressCallback | None = None,
) -> PullResult:
    """Download a repository's eraser into `registry`, pinned to its commit in the registry's lock file.

    name: name to keep it under; default: its own.
    concept: what it erases, if its file does not say; default: as in the registry already, else unknown.
    asked: the name or target that it must have.
    pin: commit and sha256 that the download must have, regardless of what `revision` names now.
    replace: replace any eraser of that name, and write again an unchanged one. Without it only an eraser from the same
    repository is replaced, and only by one of the same concept and sign.
    largest: bytes that its file may have; None is `download.largest_without_consent`.
    Raises UsageError for a new name of a signed eraser and for another concept than the file's, HubError for another
    eraser than the one that was asked for or is held and for one beyond the limits of strangers, SignatureError for an
    older one than is held, and the errors of `download` and `Registry.install`; the registry is unchanged then.
    """
    entry = download(repo, revision if pin is None else pin.commit, largest=largest, progress=progress)
    entry = dataclasses.replace(entry, asked=asked or name or entry.asked)
    origin = Origin(repo=repo, commit=_commit_of(entry), revision=_named(revision))
    if name is not None and pin is None and entry.signature_path is not None:
        _check_new_name(entry, repo, name)
    manifest = _complete_manifest(entry, repo)
    if asked is not None and not manifest.is_called(asked):
        raise HubError(
            f"{repo} holds an eraser named {manifest.name!r}, of {manifest.concept.target!r}, and not {asked!r}",
            mend=f"if that is the one you want: spmhub pull {repo}",
        )
    manifest = manifest.model_copy(update={"origin": origin, "name": name or manifest.name})
    existing = registry.find(manifest.name)
    manifest = manifest.model_copy(update={"concept": _concept(repo, entry, manifest, concept, existing)})
    if pin is not None and manifest.increment.sha256 != pin.sha256:
        raise HubError(
            f"{repo}@{pin.commit} does not match {lockfile.LOCK_NAME}: its sha256 is {manifest.increment.sha256}, "
            f"but the lock file has {pin.sha256}",
            mend="report it to the author: the file of a commit must not change",
        )
    pinned = existing is not None and existing.pin == lockfile.pin_of(manifest)
    same = pinned and existing is not None and existing.read_manifest().concept == manifest.concept
    if existing is not None and same and not replace and existing.is_adapter_of(manifest):
        if signing.required_key() is not None:
            existing.load()
        return PullResult(existing, origin, "unchanged")
    registry.check_room_for(manifest.name, replace=replace, origin=lockfile.pin_of(manifest))
    changes = Changes(()) if existing is None else _changes(existing, entry, manifest, named=concept is not None)
    if changes.grave and not replace:
        raise HubError(
            f"{repo}@{origin.commit[:12]} is not the eraser {manifest.name!r} that is held any more: "
            f"{'; '.join(changes.grave)}",
            mend=f"look at it first: spmhub show {repo}; then, if it is meant: spmhub pull {repo} --force",
        )
    accepted = replace or pin is not None  # a pinned one was accepted when it was pulled first
    if not accepted:
        _check_limits(repo, manifest)
    remarks = _audited(dataclasses.replace(entry.load(), manifest=manifest), repo, registry, accepted=accepted)
    kept = registry.install(entry, manifest, replace=replace)
    state: Literal["new", "updated"] = "new" if existing is None else "updated"
    kept = dataclasses.replace(kept, fetched=entry.fetched)
    return PullResult(kept, origin, state, changes.said, remarks)


def _audited(adapter: Adapter, repo: str, registry: Registry, *, accepted: bool) -> tuple[str, ...]:
    """Return the problems that an audit finds in a new eraser, compared with those of a registry.

    Damaged erasers of the registry are left out. Raises HubError if the new one undoes another, unless `accepted`.
    """
    from spm_hub.hub.audit import audit  # which needs torch

    held = []
    for entry in registry.entries()[:_COMPARED]:
        if entry.name != adapter.name:
            with suppress(SpmHubError):
                held.append(entry.load_now())
    (findings,) = audit([adapter], beside=held)
    if findings.undoes and not accepted:
        raise HubError(
            f"{repo} would undo an eraser that is held: {'; '.join(findings.problems)}",
            mend=f"look at it first: spmhub show {repo}; then, if it is meant: spmhub pull {repo} --force",
        )
    return findings.problems


def _check_limits(repo: str, manifest: Manifest) -> None:
    """Raise HubError if a stranger's manifest asks for more than an eraser needs."""
    from spm_hub.attachment.objections import beyond_limits  # which needs torch

    if beyond := beyond_limits(manifest):
        raise HubError(
            f"{repo} asks for more than an eraser of strangers may: {'; '.join(beyond)}",
            mend=f"look at it first: spmhub show {repo}; then, if it is meant: spmhub pull {repo} --force",
        )


def _check_new_name(entry: EraserEntry, repo: str, name: str) -> None:
    """Raise UsageError if a signed eraser has another name than the one to keep it under."""
    if (signed := entry.read_manifest().name) != name:
        raise UsageError(
            f"{repo} is signed under the name {signed!r}; as {name!r} its signature would be invalid",
            mend=f"leave --name out; if {signed} is taken: spmhub pull {repo} --registry DIR",
        )


def _changes(existing: EraserEntry, entry: EraserEntry, manifest: Manifest, *, named: bool) -> Changes:
    """Return the changes that replacing `existing` by the downloaded `entry` makes.

    named: the user has just named the concept, which is then no change of the eraser's.
    """
    try:
        old = existing.load_now()
    except SpmHubError as error:
        return Changes((f"the one that was held could not be read: {error.message}",))
    if named:
        old = dataclasses.replace(old, manifest=old.manifest.model_copy(update={"concept": manifest.concept}))
    return changes_between(old, dataclasses.replace(entry.load(), manifest=manifest))


def restore(
    registry: Registry, *, largest: int | None = None, progress: ProgressCallback | None = None
) -> Iterator[PullResult]:
    """Pull, at their pinned commits, all erasers of the lock file that the registry lacks.

    An eraser whose file does not match its pin is pulled too. largest: as for `pull`, of each.
    """
    for name, pin in lockfile.read(registry.root).items():
        if not _has_pinned(registry, name, pin):
            yield pull(
                pin.repo, pin.revision, registry=registry, name=name, pin=pin, largest=largest, progress=progress
            )


@dataclass(frozen=True)
class Age:
    """A pulled eraser, and the newest commit of the branch or tag it was pulled from.

    newest: None for an eraser pinned to a commit, or where `remark` says why it is unknown.
    """

    name: str
    pin: lockfile.Pin
    newest: str | None
    remark: str | None = None

    @property
    def state(self) -> Literal["current", "outdated", "pinned", "unknown"]:
        if self.newest is None:
            return "pinned" if self.remark is None else "unknown"
        return "current" if self.newest == self.pin.commit else "outdated"


def ages(registry: Registry) -> Iterator[Age]:
    """Compare the registry's pulled erasers with the newest commits on the Hub.

    An eraser that was pulled by commit is "pinned" and not looked up. A repository that is gone or closed gives a
    remark. Raises NetworkError.
    """
    for name, pin in lockfile.read(registry.root).items():
        if not _has_pinned(registry, name, pin):
            yield Age(name, pin, None, f"the registry lacks the file that {lockfile.LOCK_NAME} names: spmhub pull")
            continue
        if is_commit(pin.revision):
            yield Age(name, pin, None)
            continue
        try:
            info = repository_info(pin.repo, pin.revision, otherwise="use the erasers that you have: spmhub list")
            yield Age(name, pin, info.sha)
        except HubError as error:
            yield Age(name, pin, None, error.message)


def _has_pinned(registry: Registry, name: str, pin: lockfile.Pin) -> bool:
    existing = registry.find(name)
    return existing is not None and existing.pin == pin


def pull_by_name(
    name: str, repo: str, registry: Registry, progress: ProgressCallback | None = None
) -> EraserEntry | None:
    """Pull the eraser `name` from `repo` into `registry`; None if there is no such repository.

    Raises HubError if the repository has an eraser of another name and target; nothing is installed then.
    """
    try:
        return pull(repo, registry=registry, asked=name, progress=progress).entry
    except HubNotFoundError:
        return None


def _named(revision: str | None) -> str | None:
    return None if revision == constants.DEFAULT_REVISION else revision


def _commit_of(entry: EraserEntry) -> str:
    assert entry.origin is not None
    return entry.origin.commit


def _complete_manifest(entry: EraserEntry, repo: str) -> Manifest:
    """Return the downloaded eraser's manifest; without one, make one with the file's size and hash."""
    adapter = entry.load()
    adapter.check_effect()
    manifest = adapter.manifest
    if entry.manifest_path is not None:
        return manifest
    path = entry.adapter_path
    about = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    info = manifest.increment.model_copy(update=about)
    # The file name pytorch_lora_weights says nothing about the eraser; the name of the repository does.
    generic = manifest.name == slug(Path(WEIGHTS_NAME).stem)
    name = slug(repo.partition("/")[2]) if generic else manifest.name
    return manifest.model_copy(update={"increment": info, "name": name})


def _concept(
    repo: str, entry: EraserEntry, manifest: Manifest, given: str | None, existing: EraserEntry | None
) -> Concept:
    """Return the concept of a downloaded eraser: its own, the given one, or that of the earlier copy.

    Raises UsageError where one is given and the eraser has a manifest, which stays as it was published.
    """
    own = manifest.concept
    if given is not None and given not in own.names:
        if entry.manifest_path is not None or own.target is not None:
            raise UsageError(
                f"{repo} says that it erases {own.target or 'an unknown concept'}, and --concept says {given}; a "
                "pulled eraser stays as it was published",
                mend=f"spmhub pull {repo}, then spmhub convert {manifest.name} --concept {shlex.quote(given)}",
            )
        return entry.load().with_concept(given).manifest.concept
    if own.target is None and existing is not None and (pin := existing.pin) is not None and pin.repo == repo:
        return existing.read_manifest().concept
    return own


def _choose_file(repo: str, files: list[str], manifest: Manifest | None) -> str:
    """Return the name of a repository's adapter file.

    It is the file that the manifest names, else the one with diffusers' name, else the only safetensors file.
    Raises NotFoundError if there is none, UsageError if there are several.
    """
    stated = None if manifest is None else manifest.increment.file
    if stated is not None and stated in files and stated.endswith(_SUFFIX):
        return stated
    found = [WEIGHTS_NAME] if WEIGHTS_NAME in files else [file for file in files if file.endswith(_SUFFIX)]
    if not found:
        raise NotFoundError(f"{repo} has no safetensors file, so it contains no adapter", mend="spmhub list")
    if len(found) > 1:
        raise UsageError(
            f"{repo} has no {WEIGHTS_NAME} but several other safetensors files: {', '.join(found[:5])}",
            mend=f"hf download {repo} {quoted(found[0])} --local-dir . and give its path",
        )
    return found[0]


def _cached(repo: str, revision: str | None) -> EraserEntry | None:
    """Return the repository's eraser from the cache without any request; None if it was never downloaded."""

    def find(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo, name, revision=revision, local_files_only=True))
        except (errors.LocalEntryNotFoundError, errors.HFValidationError):
            return None

    manifest_path = find(MANIFEST_NAME)
    stated = None
    if manifest_path is not None:
        try:
            stated = Manifest.read(manifest_path).increment.file
        except SpmHubError:
            return None
    weights = (find(stated) if stated is not None and stated.endswith(_SUFFIX) else None) or find(WEIGHTS_NAME)
    if weights is None:
        return None
    origin = Origin(repo=repo, commit=weights.parent.name, revision=_named(revision))
    return EraserEntry(repo, weights, manifest_path, origin, asked=repo)


def cached_versions(repo: str) -> Iterator[EraserEntry]:
    """Yield the erasers of all commits of a repository that are in the Hub's cache, without any request."""
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots"
    for commit in sorted(snapshots.iterdir()) if snapshots.is_dir() else ():
        if is_commit(commit.name) and (entry := _cached(repo, commit.name)) is not None:
            yield entry


def _write_ref(repo: str, revision: str | None, commit: str) -> None:
    """Record in the cache which commit the branch or tag `revision` names, for use without a network."""
    if is_commit(revision):
        return
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    ref = folder / "refs" / (revision or constants.DEFAULT_REVISION)
    if not ref.is_file() or ref.read_text() != commit:
        write_atomic(ref, commit.encode())
