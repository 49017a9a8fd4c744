"""A registry is a folder with adapters/<name>.safetensors and manifests/<name>.json; several are asked in order.

Listing and resolving read no tensors and import no torch.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import platformdirs

from spm_hub.atomic import Content, write_atomic
from spm_hub.errors import (
    AdapterFileError,
    ManifestError,
    NetworkError,
    NotFoundError,
    RegistryError,
    SpmHubError,
    UsageError,
    nearest,
)
from spm_hub.hub import lockfile, signing, storage
from spm_hub.hub.entry import WEIGHTS_NAME, Entry, entry_of
from spm_hub.manifest import NAME, Evaluation, Manifest, Origin, slug

if TYPE_CHECKING:
    from spm_hub.adapter import Adapter

REGISTRY_VARIABLE = "SPMHUB_REGISTRY"
"""Environment variable that names a registry where no --registry is given."""

_SUFFIX = storage.SUFFIXES[storage.ADAPTERS]
HUB_REFERENCE = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*?)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Registry:
    """The erasers kept under one folder."""

    root: Path

    def entries(self) -> tuple[Entry, ...]:
        """Everything in the registry, by name; none where the folder does not exist yet."""
        try:
            files = sorted((self.root / storage.ADAPTERS).glob(f"*{_SUFFIX}"))
        except OSError as error:
            raise RegistryError(f"cannot read {self.root}: {error.strerror}", mend=f"chmod u+rx {self.root}") from error
        return tuple(entry_of(file) for file in files)

    def get(self, reference: str) -> Entry:
        """The entry of that name, or else the only one that erases the concept of that name.

        Raises NotFoundError with the nearest names; UsageError when several erase the concept.
        """
        entries = self.entries()
        for entry in entries:
            if entry.name == reference:
                return entry
        found = [entry for entry in entries if _erases(entry, reference)]
        if len(found) > 1:
            raise _ambiguous(reference, (f"{entry.name} ({entry.adapter_path})" for entry in found))
        if not found:
            raise self._missing(reference)
        return found[0]

    def find(self, name: str) -> Entry | None:
        """The entry of exactly that name."""
        path = storage.place(self.root, storage.ADAPTERS, name)
        return entry_of(path) if path.is_file() else None

    def add(self, adapter: "Adapter", *, replace: bool = False) -> Entry:
        """Keep an adapter under its name, as one that was made here: file and manifest, both or neither.

        Raises RegistryError when the folder cannot be written, or holds that name already and `replace` is not set.
        """
        image, manifest = adapter.encoded(f"{adapter.name}{_SUFFIX}")
        return self._put(image.write_to, manifest.model_copy(update={"origin": None}), replace=replace)

    def install(self, source: Entry, manifest: Manifest | None = None, *, replace: bool = False) -> Entry:
        """Keep a copy, bit for bit, of an adapter that lies elsewhere with its manifest; everything is verified first.

        `manifest` is to stand beside it instead of its own, and says where the adapter was pulled from just now: the
        lock file believes that, and no manifest that came with a file.
        Raises ManifestError where there is none, AdapterFileError, and RegistryError as `add` does.
        """
        loaded = source.load().manifest
        if source.manifest_path is None and manifest is None:
            raise ManifestError(f"{source.adapter_path} has no manifest beside it, so nothing to be verified against")
        pin = None if manifest is None else lockfile.pin_of(manifest)
        manifest = manifest or loaded
        info = manifest.increment.model_copy(update={"file": f"{manifest.name}{_SUFFIX}"})

        def copy(file: BinaryIO) -> None:
            digest = hashlib.sha256()
            with open(source.adapter_path, "rb") as original:
                while block := original.read(2**20):
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() != info.sha256:
                raise AdapterFileError(f"{source.adapter_path} was altered while it was copied")

        signature = None if source.signature_path is None else signing.read(source.signature_path)
        return self._put(copy, manifest.model_copy(update={"increment": info}), signature, pin, replace=replace)

    def _put(
        self,
        adapter: Content,
        manifest: Manifest,
        signature: bytes | None = None,
        pin: lockfile.Pin | None = None,
        *,
        replace: bool,
    ) -> Entry:
        self.check_room_for(manifest.name, replace=replace, origin=pin)
        parts = {storage.ADAPTERS: adapter, storage.MANIFESTS: manifest.to_json().encode()}
        if signature is not None:
            parts[storage.SIGNATURES] = signature
        with storage.writing(self.root):
            entry = self.check_room_for(manifest.name, replace=replace, origin=pin)
            storage.change(self.root, manifest.name, parts)
            lockfile.record(self.root, manifest.name, pin)
        return entry

    def check_room_for(self, name: str, *, replace: bool = False, origin: Origin | None = None) -> Entry:
        """The entry that an adapter of that name would become; asked before a training and not after it.

        One that was pulled from the same repository of the Hub as `origin` may be replaced by another commit of it.

        Raises UsageError for what is no name, RegistryError as `add` does.
        """
        if not re.fullmatch(NAME, name):
            raise UsageError(f"{name!r} is no name for an eraser", mend=f"name it {slug(name)}")
        manifest = storage.place(self.root, storage.MANIFESTS, name)
        entry = Entry(name, storage.place(self.root, storage.ADAPTERS, name), manifest)
        if name in storage.RESERVED:
            raise RegistryError(f"{name!r} is a reserved name: {manifest} is something else")
        if entry.adapter_path.exists() and not replace and not _same_repository(entry, origin):
            raise RegistryError(
                f"{self.root} already holds an eraser named {name!r}",
                mend="name this one differently with --name, or replace that one with --force",
            )
        for folder in (entry.adapter_path.parent, manifest.parent):
            existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
            try:
                # Tried and not asked of os.access, which believes root capable of anything.
                with tempfile.TemporaryFile(dir=existing):
                    pass
            except OSError as error:
                raise RegistryError(
                    f"the registry {self.root} cannot be written: {existing}: {error.strerror}",
                    mend=f"chmod u+w {existing}, or name another registry with --registry DIR",
                ) from error
        return entry

    def record_evaluation(self, name: str, evaluation: Sequence[Evaluation]) -> Manifest:
        """Puts measured numbers into the manifest beside an adapter; older ones of the same protocol and base go.

        The adapter file is not touched. Raises NotFoundError, or RegistryError when the manifest cannot be written.
        """
        entry = self.get(name)
        if entry.manifest_path is None:
            raise RegistryError(f"{entry.adapter_path} has no manifest beside it to record an evaluation in")
        with storage.writing(self.root):
            manifest = entry.read_manifest()
            measured = {(new.protocol, new.base) for new in evaluation}
            kept = [old for old in manifest.evaluation if (old.protocol, old.base) not in measured]
            updated = manifest.model_copy(update={"evaluation": (*kept, *evaluation)})
            write_atomic(entry.manifest_path, updated.to_json().encode())
        return updated

    def sign(self, name: str, key: Path) -> Path:
        """Sign an adapter and its manifest, signed or not, with a private key; returns where the signature is kept.

        Raises NotFoundError, ManifestError where it has no manifest, and as `signing.sign` does.
        """
        entry = self.find(name)
        if entry is None:
            raise self._missing(name)
        with storage.writing(self.root):
            if entry.manifest_path is None:
                raise ManifestError(f"{entry.adapter_path} has no manifest beside it, so nothing that could be signed")
            entry.load_now()
            signature = storage.place(self.root, storage.SIGNATURES, name)
            write_atomic(signature, signing.sign(entry.adapter_path, entry.manifest_path, key))
        return signature

    def remove(self, name: str) -> None:
        """Delete an adapter and its manifest. Raises NotFoundError, or RegistryError when they cannot be deleted."""
        if not any(entry.name == name for entry in self.entries()):
            raise self._missing(name)
        with storage.writing(self.root):
            if not storage.place(self.root, storage.ADAPTERS, name).exists():
                raise self._missing(name)
            storage.change(self.root, name, {})
            lockfile.record(self.root, name, None)

    def gc(self, *, dry_run: bool = False) -> tuple[storage.Leftover, ...]:
        """Delete what belongs to no eraser and return it: see `storage.leftovers`. Raises RegistryError."""
        if not self.root.is_dir():
            return ()
        with storage.writing(self.root):
            found = tuple(storage.leftovers(self.root))
            for leftover in () if dry_run else found:
                storage.delete(leftover.path)
        return found

    def _missing(self, name: str) -> NotFoundError:
        return _unknown(name, [known.name for known in self.entries()], f"in {self.root}")


def user_registry() -> Registry:
    """The user's own, in the platform's data folder."""
    return Registry(platformdirs.user_data_path("spm-hub", appauthor=False))


def registries(registry: Path | None = None) -> tuple[Registry, ...]:
    """Where names are looked up, in this order: `registry` or SPMHUB_REGISTRY, the working folder, the user's own.

    Raises RegistryError when the one that was asked for does not exist.
    """
    roots = [user_registry().root]
    here = Path.cwd()
    if (here / storage.ADAPTERS).is_dir() and (here / storage.MANIFESTS).is_dir():
        roots.insert(0, here)
    asked = registry or (Path(named) if (named := os.environ.get(REGISTRY_VARIABLE)) else None)
    if asked is not None:
        if not asked.is_dir():
            raise RegistryError(f"the registry {asked} does not exist", mend=f"mkdir -p {asked / storage.ADAPTERS}")
        roots.insert(0, asked)
    return tuple(map(Registry, roots))


def holding(name: str, registry: Path | None = None) -> Registry:
    """The first registry that holds an eraser of exactly that name. Raises NotFoundError with the nearest names."""
    known = registries(registry)
    names: list[str] = []
    for place in known:
        names += [entry.name for entry in place.entries()]
        if name in names:
            return place
    raise _unknown(name, names, "in " + ", ".join(str(place.root) for place in known))


def resolve(
    reference: str, registry: Path | None = None, *, progress: Callable[[int, int], None] | None = None
) -> Entry:
    """Find what a reference names: a path, a name or concept in a registry, or owner/name[@revision] on the Hub.

    A name that no registry knows is pulled from the Hub, where `remote.owner` keeps it, into `registry` or the user's
    own. What is on the Hub and was pulled before is taken from the registry, at the commit it is pinned to there.
    `progress` is told the bytes of a download.
    Raises UsageError when it could be several things, NotFoundError with the nearest names when it is none,
    NetworkError when the Hub is needed and cannot be reached.
    """
    if not reference.strip():
        raise UsageError("the reference to an adapter is empty", mend="spmhub list")
    path = Path(reference).expanduser()
    looks_like_path = path.suffix == _SUFFIX or path.is_absolute() or reference.startswith(("./", "../", "~"))
    if looks_like_path or ("/" in reference and path.exists()):
        return _entry_at(path)
    known = registries(registry)
    if match := HUB_REFERENCE.fullmatch(reference):
        from spm_hub.hub.remote import download

        pinned = _pinned(match["repo"], match["revision"], known)
        return pinned or download(match["repo"], match["revision"], progress=progress)
    hit, names = None, []
    if re.fullmatch(NAME, reference):
        # A name in a later registry goes before a concept in an earlier one, which its manifest may call anything.
        hit = next((found for place in known if (found := place.find(reference))), None)
    for place in known if hit is None else ():
        try:
            hit = place.get(reference)
            break
        except NotFoundError:
            names += [entry.name for entry in place.entries()]
    if path.is_file() or (path / WEIGHTS_NAME).is_file():
        if hit is not None:
            raise _ambiguous(reference, [f"./{reference} (a file here)", f"{hit.adapter_path} (in a registry)"])
        return _entry_at(path)
    return hit or _from_owner(reference, registry, names, progress)


def load(reference: str, registry: Path | None = None, *, lazy: bool = False) -> "Adapter":
    """The adapter that a reference names; see `resolve`, and `adapter.load_file` for `lazy`."""
    return resolve(reference, registry).load(lazy=lazy)


def _same_repository(held: Entry, origin: Origin | None) -> bool:
    """Whether manifest and lock file both say so; the latter may name another commit, as version control brings it."""
    if origin is None:
        return False
    pin = lockfile.read(held.adapter_path.parent.parent).get(held.name)
    try:
        before = held.read_manifest().origin
    except SpmHubError:
        return False
    return pin is not None and before is not None and before.repo == pin.repo == origin.repo


def _pinned(repo: str, revision: str | None, known: Iterable[Registry]) -> Entry | None:
    """The entry that was pulled from there before, if any registry still holds it, and as its lock file names it."""
    for place in known:
        for name, pin in lockfile.read(place.root).items():
            if pin.repo == repo and revision in (pin.revision, pin.commit):
                entry = place.find(name)
                if entry is not None and entry.pin == pin:
                    return entry
    return None


def _from_owner(
    reference: str, registry: Path | None, names: list[str], progress: Callable[[int, int], None] | None
) -> Entry:
    """A name that no registry knows, pulled from the Hub. Raises NotFoundError, HubError for one that is closed."""
    from spm_hub.hub import remote

    known, whose = registries(registry), remote.owner()
    # Its manifest may have another name than its repository: then that is how it is held.
    if whose is not None and (held := _pinned(f"{whose}/{slug(reference)}", None, known)):
        return held
    where = ", ".join(str(place.root) for place in known)
    asked = registry is not None or REGISTRY_VARIABLE in os.environ
    try:
        found = remote.by_name(slug(reference), known[0] if asked else user_registry(), progress)
    except NetworkError as error:
        raise _unknown(reference, names, f"in {where}, and {error.message}") from error
    if found is None:
        raise _unknown(
            reference, names, f"in {where}" + (f", nor on the Hub as {whose}/{slug(reference)}" if whose else "")
        )
    return found


def _entry_at(path: Path) -> Entry:
    """The entry of a path: an adapter file, or a folder laid out as a repository of the Hub."""
    if path.is_dir():
        files = [path / WEIGHTS_NAME] if (path / WEIGHTS_NAME).is_file() else sorted(path.glob(f"*{_SUFFIX}"))
        if len(files) > 1:
            raise _ambiguous(str(path), map(str, files))
        if not files:
            raise NotFoundError(f"{path}: there is no {_SUFFIX} file in this folder", mend="spmhub list")
        return entry_of(files[0])
    if not path.exists():
        siblings = [str(file) for file in path.parent.glob(f"*{_SUFFIX}")]
        raise _unknown(str(path), siblings, "on this disk")
    return entry_of(path)


def _erases(entry: Entry, concept: str) -> bool:
    try:
        manifest = entry.read_manifest()
    except SpmHubError:
        return (
            False  # A broken neighbour must not stand between the user and another eraser; loading it says what it has.
        )
    names = (manifest.concept.target, *manifest.concept.aliases)
    return concept.casefold() in (name.casefold() for name in names)


def _ambiguous(reference: str, candidates: Iterable[str]) -> UsageError:
    listed = "".join(f"\n  {candidate}" for candidate in candidates)
    return UsageError(f"{reference!r} could be any of:{listed}", mend="name one of these")


def _unknown(reference: str, names: Iterable[str], where: str) -> NotFoundError:
    meant = nearest(reference, names)
    hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
    return NotFoundError(f"no eraser {reference!r} {where}{hint}", mend="spmhub list")
