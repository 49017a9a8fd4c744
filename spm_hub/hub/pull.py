"""Adapters from the Hugging Face Hub: fetched at one commit, verified, and kept in a registry."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import ModelInfo, constants, errors, hf_hub_download

from spm_hub.adapters.manifest import MAX_BYTES, Manifest, Origin, slug
from spm_hub.errors import HubError, HubNotFoundError, NetworkError, NotFoundError, SpmHubError, UsageError
from spm_hub.hub.download import Progress, fetch
from spm_hub.io.atomic import write_atomic
from spm_hub.io.environment import OWNER_VARIABLE
from spm_hub.io.hashing import sha256_of
from spm_hub.io.hub_client import is_commit, reaching, repository_info
from spm_hub.registry import lockfile, signing, storage
from spm_hub.registry.entry import MANIFEST_NAME, WEIGHTS_NAME, EraserEntry
from spm_hub.registry.registry import Registry

DEFAULT_OWNER = "spm-hub"

_SUFFIX = ".safetensors"


def owner() -> str | None:
    """Whose repositories on the Hub bare names are looked up in; None for nobody's."""
    return os.environ.get(OWNER_VARIABLE, DEFAULT_OWNER).strip() or None


def download(repo: str, revision: str | None = None, *, progress: Progress | None = None) -> EraserEntry:
    """The adapter of a repository, and its manifest where it has one, both of one commit, in the Hub's cache.

    A commit that is in the cache is taken from there without a request; so is anything while the Hub is out of reach.
    What is fetched is verified before it enters the cache: against the Hub's hashes and the manifest's.
    Raises HubNotFoundError, HubError, ManifestError, NetworkError; UsageError when it holds several adapters.
    """
    cached = _cached(repo, revision)
    # Without its manifest it may be what another program fetched of a repository that has one.
    if is_commit(revision) and cached is not None and cached.manifest_path is not None:
        return cached
    otherwise = f"once with one: hf download {repo}"
    try:
        info = repository_info(repo, revision, otherwise=otherwise, files=True)
    except NetworkError:
        if cached is not None:
            return cached
        raise
    commit = info.sha
    if commit is None or not is_commit(commit):
        raise HubError(f"the Hub names no commit for {repo} at {revision or 'main'} (it says {commit!r})")
    is_new = _cached(repo, commit) is None
    names = [sibling.rfilename for sibling in info.siblings or ()]
    with reaching(repo, revision, otherwise=otherwise):
        manifest_path, manifest = None, None
        if MANIFEST_NAME in names:
            manifest_path = fetch(repo, MANIFEST_NAME, commit, largest=MAX_BYTES)
            manifest = Manifest.read(manifest_path)
        weights = _choose(repo, names, manifest)
        stated = None if manifest is None else manifest.increment
        if stated is not None:
            _compare_sizes(repo, info, weights, stated.bytes)
        # Before the weights: what has those is taken from the cache as it is, and must not be without its signature.
        if signing.SIGNATURE_NAME in names:
            fetch(repo, signing.SIGNATURE_NAME, commit, largest=signing.MAX_BYTES)
        said = None if stated is None else stated.bytes
        path = fetch(
            repo,
            weights,
            commit,
            sha256=None if stated is None else stated.sha256,
            largest=storage.MAX_BYTES if said is None else min(said, storage.MAX_BYTES),
            progress=progress,
        )
    _remember(repo, revision, commit)
    return EraserEntry(
        repo, path, manifest_path, Origin(repo=repo, commit=commit, revision=_named(revision)), fetched=is_new
    )


@dataclass(frozen=True)
class Pulled:
    """What a pull did to the registry."""

    entry: EraserEntry
    origin: Origin
    state: Literal["new", "updated", "unchanged"]


def pull(
    repo: str,
    revision: str | None = None,
    *,
    registry: Registry,
    name: str | None = None,
    pin: lockfile.Pin | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Pulled:
    """Keep the adapter of a repository in `registry`, pinned to its commit there and in the registry's lock file.

    `name` it is to have there, unless its own. One that was pulled from the same repository before is replaced by the
    commit that is asked for now; any other of that name only where `replace`, which also puts anew what is there
    already. `pin` is the commit and the file that it has to be, whatever `revision` names now.
    Raises UsageError for another name than the one that is signed, and what `download` and `Registry.install` do; the
    registry then holds what it held before.
    """
    entry = download(repo, revision if pin is None else pin.commit, progress=progress)
    origin = Origin(repo=repo, commit=_commit_of(entry), revision=_named(revision))
    manifest = _with_file(entry, repo)
    if name not in (None, manifest.name) and entry.signature_path is not None:
        raise UsageError(
            f"{repo} is signed under the name {manifest.name!r}: kept as {name!r}, its signature would not hold",
            mend=f"leave --name out; beside another {manifest.name}: spmhub pull {repo} --registry DIR",
        )
    manifest = manifest.model_copy(update={"origin": origin, "name": name or manifest.name})
    if pin is not None and manifest.increment.sha256 != pin.sha256:
        raise HubError(
            f"{repo}@{pin.commit} is not what {lockfile.LOCK_NAME} names: its sha256 is {manifest.increment.sha256}, "
            f"expected was {pin.sha256}",
            mend="tell its author; commits do not change by themselves",
        )
    held = registry.find(manifest.name)
    if held is not None and not replace and held.pin == lockfile.pin_of(manifest) and held.is_adapter_of(manifest):
        return Pulled(held, origin, "unchanged")
    kept = registry.install(entry, manifest, replace=replace)
    return Pulled(dataclasses.replace(kept, fetched=entry.fetched), origin, "new" if held is None else "updated")


def restore(registry: Registry, *, progress: Progress | None = None) -> Iterator[Pulled]:
    """Pull every eraser again, at its pinned commit, whose file in the registry is not the one the lock file names."""
    for name, pin in lockfile.read(registry.root).items():
        if not _is_held(registry, name, pin):
            yield pull(pin.repo, pin.revision, registry=registry, name=name, pin=pin, progress=progress)


@dataclass(frozen=True)
class Age:
    """A pulled eraser, and the newest commit of the branch or tag it was pulled from."""

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
    """How old the registry's pulled erasers are; one that was pulled by its commit stays where it is.

    Raises NetworkError; a repository that is gone or closed is a remark.
    """
    for name, pin in lockfile.read(registry.root).items():
        if not _is_held(registry, name, pin):
            yield Age(name, pin, None, f"the registry has not the file that {lockfile.LOCK_NAME} names: spmhub pull")
            continue
        if is_commit(pin.revision):
            yield Age(name, pin, None)
            continue
        try:
            info = repository_info(pin.repo, pin.revision, otherwise="keep what you have: spmhub list")
            yield Age(name, pin, info.sha)
        except HubError as error:
            yield Age(name, pin, None, error.message)


def _is_held(registry: Registry, name: str, pin: lockfile.Pin) -> bool:
    held = registry.find(name)
    return held is not None and held.pin == pin


def by_name(name: str, registry: Registry, progress: Progress | None = None) -> EraserEntry | None:
    """Pull the repository `name` of the owner whom bare names mean; None where the Hub has none."""
    whose = owner()
    if whose is None:
        return None
    try:
        return pull(f"{whose}/{name}", registry=registry, progress=progress).entry
    except HubNotFoundError:
        return None


def _named(revision: str | None) -> str | None:
    return None if revision == constants.DEFAULT_REVISION else revision


def _commit_of(entry: EraserEntry) -> str:
    assert entry.origin is not None
    return entry.origin.commit


def _with_file(entry: EraserEntry, repo: str) -> Manifest:
    """The manifest of what was downloaded, with size and hash of its file, also where the repository has none."""
    manifest = entry.load().manifest
    if entry.manifest_path is not None:
        return manifest
    path = entry.adapter_path
    about = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    info = manifest.increment.model_copy(update=about)
    # A file of another program is called pytorch_lora_weights; what it is, its repository says.
    generic = manifest.name == slug(Path(WEIGHTS_NAME).stem)
    name = slug(repo.partition("/")[2]) if generic else manifest.name
    return manifest.model_copy(update={"increment": info, "name": name})


def _choose(repo: str, files: list[str], manifest: Manifest | None) -> str:
    """The adapter file among a repository's: the one its manifest names, or diffusers' name, or the only one."""
    stated = None if manifest is None else manifest.increment.file
    if stated is not None and stated in files and stated.endswith(_SUFFIX):
        return stated
    found = [WEIGHTS_NAME] if WEIGHTS_NAME in files else [file for file in files if file.endswith(_SUFFIX)]
    if not found:
        raise NotFoundError(f"{repo} holds no safetensors file, so no adapter", mend="spmhub list")
    if len(found) > 1:
        raise UsageError(
            f"{repo} holds no {WEIGHTS_NAME} but several others: {', '.join(found[:5])}",
            mend=f"hf download {repo} {found[0]} --local-dir . and give its path",
        )
    return found[0]


def _compare_sizes(repo: str, info: ModelInfo, weights: str, stated: int | None) -> None:
    """Before anything large is fetched. Raises HubError."""
    size = next((sibling.size for sibling in info.siblings or () if sibling.rfilename == weights), None)
    if None not in (size, stated) and size != stated:
        raise HubError(
            f"{repo}: its manifest says increment.bytes {stated}, {weights} has {size}", mend="tell its author"
        )


def _cached(repo: str, revision: str | None) -> EraserEntry | None:
    """The adapter from the cache, when the repository has been downloaded before; no request is made."""

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
    return EraserEntry(repo, weights, manifest_path, origin)


def _remember(repo: str, revision: str | None, commit: str) -> None:
    """Let the cache know the commit by the name it was asked for, for when there is no network."""
    if is_commit(revision):
        return
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    ref = folder / "refs" / (revision or constants.DEFAULT_REVISION)
    if not ref.is_file() or ref.read_text() != commit:
        write_atomic(ref, commit.encode())
