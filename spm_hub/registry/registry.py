"""A registry is a folder with adapters/<name>.safetensors and manifests/<name>.json; several are asked in order.

Listing reads no tensors and imports no torch.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import platformdirs

from spm_hub.adapters.manifest import NAME, Evaluation, Manifest, Origin, slug
from spm_hub.errors import (
    AdapterFileError,
    ManifestError,
    NotFoundError,
    RegistryError,
    SpmHubError,
    UsageError,
    nearest,
)
from spm_hub.io.atomic import Content, write_atomic
from spm_hub.io.environment import REGISTRY_VARIABLE
from spm_hub.registry import lockfile, signing, storage
from spm_hub.registry.entry import Entry, entry_of

if TYPE_CHECKING:
    from spm_hub.adapters.adapter import Adapter

_SUFFIX = storage.SUFFIXES[storage.ADAPTERS]
HUB_REFERENCE = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*?)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class _Coming:
    """An adapter on its way into a registry, with what will lie and stand beside it."""

    manifest: Manifest
    adapter: Content
    signature: bytes | None = None
    pin: lockfile.Pin | None = None

    def parts(self) -> dict[str, Content]:
        """By the folders that they go to."""
        parts = {storage.ADAPTERS: self.adapter, storage.MANIFESTS: self.manifest.to_json().encode()}
        return parts if self.signature is None else {**parts, storage.SIGNATURES: self.signature}


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
            raise ambiguous(reference, (f"{entry.name} ({entry.adapter_path})" for entry in found))
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
        return self._put([_made_here(adapter)], replace=replace)[0]

    def install(self, source: Entry, manifest: Manifest | None = None, *, replace: bool = False) -> Entry:
        """Keep a copy, bit for bit, of an adapter that lies elsewhere with its manifest; everything is verified first.

        `manifest` is to stand beside it instead of its own, and says where the adapter was pulled from just now: the
        lock file believes that, and no manifest that came with a file.
        Raises ManifestError where there is none, AdapterFileError, and RegistryError as `add` does.
        """
        return self._put([_copied(source, manifest)], replace=replace)[0]

    def install_all(self, sources: Sequence[Entry], *, replace: bool = False) -> tuple[Entry, ...]:
        """Keep copies of several adapters, as `install` does of one, and all of them or none.

        A file of another program, which has no manifest to be verified against at the next place, is written as ours.
        Raises UsageError for two of one name, and what `install` does.
        """
        coming = [_made_here(one.load()) if one.manifest_path is None else _copied(one) for one in sources]
        names = [one.manifest.name for one in coming]
        if twice := [f"{one.adapter_path}" for one, name in zip(sources, names, strict=True) if names.count(name) > 1]:
            raise UsageError(
                f"these have one name: {', '.join(twice)}", mend="name one of them, or keep the others elsewhere"
            )
        return self._put(coming, replace=replace)

    def _put(self, coming: Sequence[_Coming], *, replace: bool) -> tuple[Entry, ...]:
        def check_room() -> tuple[Entry, ...]:
            return tuple(self.check_room_for(one.manifest.name, replace=replace, origin=one.pin) for one in coming)

        check_room()
        with storage.writing(self.root):
            entries = check_room()
            storage.change(self.root, {one.manifest.name: one.parts() for one in coming})
            for one in coming:
                lockfile.record(self.root, one.manifest.name, one.pin)
        return entries

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
            storage.change(self.root, {name: {}})
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
        return unknown(name, [known.name for known in self.entries()], f"in {self.root}")


def user_registry() -> Registry:
    """The user's own, in the platform's data folder."""
    return Registry(platformdirs.user_data_path("spm-hub", appauthor=False))


def asked_for(registry: Path | None = None) -> Path | None:
    """The registry that a user names: `registry`, or else SPMHUB_REGISTRY where that is not empty."""
    return registry or (Path(named) if (named := os.environ.get(REGISTRY_VARIABLE)) else None)


def registries(registry: Path | None = None) -> tuple[Registry, ...]:
    """Where names are looked up, in this order: `registry` or SPMHUB_REGISTRY, the working folder, the user's own.

    Raises RegistryError when the one that was asked for does not exist.
    """
    roots = [user_registry().root]
    here = Path.cwd()
    if (here / storage.ADAPTERS).is_dir() and (here / storage.MANIFESTS).is_dir():
        roots.insert(0, here)
    if (asked := asked_for(registry)) is not None:
        if not asked.is_dir():
            raise RegistryError(f"the registry {asked} does not exist", mend=f"mkdir -p {asked / storage.ADAPTERS}")
        roots.insert(0, asked)
    return tuple(map(Registry, roots))


def chosen(registry: Path | None = None) -> tuple[Registry, ...]:
    """Where erasers are listed and changed: in the one that was asked for and nowhere else, or unless asked, in all.

    Raises RegistryError when the one that was asked for does not exist.
    """
    known = registries(registry)
    return known if asked_for(registry) is None else known[:1]


def holding(name: str, registry: Path | None = None) -> Registry:
    """The first of `chosen` that holds an eraser of exactly that name. Raises NotFoundError with the nearest names."""
    known = chosen(registry)
    names: list[str] = []
    for place in known:
        names += [entry.name for entry in place.entries()]
        if name in names:
            return place
    raise unknown(name, names, "in " + ", ".join(str(place.root) for place in known))


def _made_here(adapter: "Adapter") -> _Coming:
    image, manifest = adapter.encoded(f"{adapter.name}{_SUFFIX}")
    return _Coming(manifest.model_copy(update={"origin": None}), image.write_to)


def _copied(source: Entry, manifest: Manifest | None = None) -> _Coming:
    """A verified copy of what lies elsewhere; see `Registry.install`."""
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
    return _Coming(manifest.model_copy(update={"increment": info}), copy, signature, pin)


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


def _erases(entry: Entry, concept: str) -> bool:
    try:
        manifest = entry.read_manifest()
    except SpmHubError:
        return (
            False  # A broken neighbour must not stand between the user and another eraser; loading it says what it has.
        )
    names = (manifest.concept.target, *manifest.concept.aliases)
    return concept.casefold() in (name.casefold() for name in names)


def ambiguous(reference: str, candidates: Iterable[str]) -> UsageError:
    """The error for a reference that means several adapters, which it lists."""
    listed = "".join(f"\n  {candidate}" for candidate in candidates)
    return UsageError(f"{reference!r} could be any of:{listed}", mend="name one of these")


def unknown(reference: str, names: Iterable[str], where: str) -> NotFoundError:
    """The error for a reference that means none, with those of `names` that are nearest to it."""
    meant = nearest(reference, names)
    hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
    return NotFoundError(f"no eraser {reference!r} {where}{hint}", mend="spmhub list")
