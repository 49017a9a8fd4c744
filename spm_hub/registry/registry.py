"""A registry: a folder with adapters/<name>.safetensors and manifests/<name>.json.

Names are looked up in several registries in order. Listing reads no tensors and imports no torch.
"""

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from spm_hub.adapters.manifest import NAME, Evaluation, Manifest, Origin, plain_name, slug
from spm_hub.errors import (
    AdapterFileError,
    ManifestError,
    NotFoundError,
    RegistryError,
    SpmHubError,
    UsageError,
    ambiguous_eraser,
    unknown_eraser,
)
from spm_hub.io.atomic import Content, write_atomic, write_together
from spm_hub.io.environment import REGISTRY_VARIABLE, user_folder
from spm_hub.io.wording import counted, quoted
from spm_hub.registry import concept_index, lockfile, signing, storage
from spm_hub.registry.entry import EraserEntry, entry_of

if TYPE_CHECKING:
    from spm_hub.adapters.adapter import Adapter

_SUFFIX = storage.SUFFIXES[storage.ADAPTERS]
_CLONE = Path(__file__).resolve().parents[2]
"""The folder that the running code is in: a clone of spm-hub, or a folder of installed packages."""
_PACKAGED = Path(__file__).resolve().parents[1] / "erasers"
"""The erasers that an installed package brings along, for the sketchbook; a clone has them in its own folders."""
HUB_REFERENCE = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*?)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class _NewEraser:
    """An adapter to be written into a registry, with its manifest, signature and pin."""

    manifest: Manifest
    adapter: Content
    signature: bytes | None = None
    pin: lockfile.Pin | None = None

    def parts(self) -> dict[str, Content]:
        """Return the files' contents by the registry folder that each belongs in."""
        parts = {storage.ADAPTERS: self.adapter, storage.MANIFESTS: self.manifest.to_json().encode()}
        return parts if self.signature is None else {**parts, storage.SIGNATURES: self.signature}


@dataclass(frozen=True)
class Registry:
    """The erasers kept under one folder."""

    root: Path

    def entries(self) -> tuple[EraserEntry, ...]:
        """Return all erasers, sorted by name; none if the folder does not exist yet. Raises RegistryError."""
        try:
            files = sorted((self.root / storage.ADAPTERS).glob(f"*{_SUFFIX}"))
        except OSError as error:
            raise RegistryError(
                f"cannot read {self.root}: {error.strerror}", mend=f"chmod u+rx {quoted(self.root)}"
            ) from error
        return tuple(entry_of(file) for file in files)

    def get(self, reference: str) -> EraserEntry:
        """Return the eraser of that name, or else the only one whose target has that name.

        An alias never finds an eraser: anybody's manifest can claim any alias.
        Raises NotFoundError with the nearest names, UsageError if several have the target.
        """
        if (entry := self.find(reference)) is not None:
            return entry
        found = self.erasing(reference)
        if len(found) > 1:
            raise _ambiguous(reference, found)
        spelt = found[0] if found else self.find_spelt(reference)
        if spelt is None:
            raise self._missing(reference)
        return spelt

    def erasing(self, concept: str) -> list[EraserEntry]:
        """Return all erasers whose name or target is `concept`, in any spelling; an alias is neither."""
        known = concept_index.candidates(self.root, plain_name(concept))
        indexed = [entry for name in known or () if (entry := self.find(name)) is not None]
        if found := [entry for entry in indexed if plain_name(concept) in _called(entry)]:
            return found
        begun = time.time_ns()
        names: dict[str, list[str]] = {}
        found = []
        for entry in self.entries():
            called = _called(entry)
            found += [entry] if plain_name(concept) in called else []
            for name in called:
                names.setdefault(name, []).append(entry.name)
        if known is None:
            concept_index.keep(self.root, names, begun)
        return found

    def find(self, name: str) -> EraserEntry | None:
        """Return the eraser of exactly that name, or None."""
        if Path(name).name != name:
            return None  # a path, which no name is
        path = storage.part_path(self.root, storage.ADAPTERS, name)
        return entry_of(path) if path.is_file() else None

    def find_spelt(self, reference: str) -> EraserEntry | None:
        """Return the eraser of that name, apart from case, accents, spaces, hyphens and underscores.

        None if there is none. Raises UsageError if there are several.
        """
        wanted = plain_name(reference)
        found = [entry for entry in self.entries() if plain_name(entry.name) == wanted]
        if len(found) > 1:
            raise _ambiguous(reference, found)
        return found[0] if found else None

    def add(self, adapter: "Adapter", *, replace: bool = False) -> EraserEntry:
        """Save an adapter under its name, without an origin on the Hub: file and manifest, both or neither.

        Raises RegistryError if the folder cannot be written, or already has that name and `replace` is False.
        """
        return self._put([_new_eraser_from(adapter)], replace=replace)[0]

    def install(self, source: EraserEntry, manifest: Manifest | None = None, *, replace: bool = False) -> EraserEntry:
        """Copy an adapter file and its manifest into this registry, bit for bit, after verifying both.

        Where a signature is required, an older one than is held is refused.
        manifest: written instead of the source's own. Its `origin` goes into the lock file, as the caller has just
        pulled the adapter from there; the origin in a manifest that came with a file is only a claim and does not.
        Raises ManifestError if there is no manifest, AdapterFileError, SignatureError, and RegistryError as `add` does.
        """
        self._check_not_older(source)
        return self._put([_verified_copy(source, manifest)], replace=replace)[0]

    def install_all(self, sources: Sequence[EraserEntry], *, replace: bool = False) -> tuple[EraserEntry, ...]:
        """Copy several adapters into this registry as `install` does, all of them or none.

        A file of another program has no manifest; it is written in our layout, so that it can be verified later.
        Raises UsageError for two of one name, and the errors of `install`.
        """
        erasers = [
            _new_eraser_from(one.load()) if one.manifest_path is None else _verified_copy(one) for one in sources
        ]
        for one in sources:
            self._check_not_older(one)
        names = [one.manifest.name for one in erasers]
        if twice := [f"{one.adapter_path}" for one, name in zip(sources, names, strict=True) if names.count(name) > 1]:
            raise UsageError(
                f"these erasers have one name: {', '.join(twice)}",
                mend="name only one, or use another registry",
            )
        return self._put(erasers, replace=replace)

    def _check_not_older(self, source: EraserEntry) -> None:
        if signing.required_key() is not None and (held := self.find(source.read_manifest().name)) is not None:
            source.check_not_older([held])

    def _put(self, erasers: Sequence[_NewEraser], *, replace: bool) -> tuple[EraserEntry, ...]:
        def check_room() -> tuple[EraserEntry, ...]:
            return tuple(self.check_room_for(one.manifest.name, replace=replace, origin=one.pin) for one in erasers)

        check_room()
        with storage.write_lock(self.root):
            entries = check_room()
            storage.change(self.root, {one.manifest.name: one.parts() for one in erasers})
            for one in erasers:
                lockfile.record(self.root, one.manifest.name, one.pin)
        return entries

    def check_room_for(self, name: str, *, replace: bool = False, origin: Origin | None = None) -> EraserEntry:
        """Return the entry that an adapter of this name would get, after checking that it can be written.

        Call it before a long training, so that a missing permission or a taken name is reported first. An eraser that
        was pulled from the repository of `origin` may be replaced by another commit of it.
        Raises UsageError for an invalid name, RegistryError as `add` does.
        """
        if not re.fullmatch(NAME, name):
            raise UsageError(f"{name!r} is not a valid name for an eraser", mend=f"name it {slug(name)}")
        manifest = storage.part_path(self.root, storage.MANIFESTS, name)
        entry = EraserEntry(name, storage.part_path(self.root, storage.ADAPTERS, name), manifest)
        if storage.is_reserved(name):
            raise RegistryError(
                f"{name!r} is a reserved name: of our own files, or of a device on Windows",
                mend="another name with --name; in Python name=",
            )
        if entry.adapter_path.exists() and not replace and not _same_repository(entry, origin):
            raise RegistryError(
                f"{self.root} already has an eraser named {name!r}",
                mend="another name with --name, or replace that eraser with --force; in Python name=, replace=True",
            )
        for folder in (entry.adapter_path.parent, manifest.parent):
            existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
            try:
                # Try to write: os.access says yes to root even on a read-only file system.
                with tempfile.TemporaryFile(dir=existing):
                    pass
            except OSError as error:
                raise RegistryError(
                    f"the registry {self.root} cannot be written: {existing}: {error.strerror}",
                    mend=f"chmod u+w {quoted(existing)}, or name another registry with --registry DIR",
                ) from error
        return entry

    def record_evaluation(self, name: str, evaluation: Sequence[Evaluation], *, replace: bool = False) -> Manifest:
        """Write measured numbers into an eraser's manifest; they replace those of the same protocol and base.

        replace: whether they may replace numbers that rest on more samples or steps.
        The adapter file does not change. Raises NotFoundError, or RegistryError if the manifest cannot be written.
        """
        entry = self.get(name)
        if entry.manifest_path is None:
            raise RegistryError(f"{entry.adapter_path} has no manifest file to record an evaluation in")
        with storage.write_lock(self.root):
            manifest = entry.read_manifest()
            for new in () if replace else evaluation:
                check_richness(manifest, new.protocol, new.base, new.samples, new.steps)
            measured = {(new.protocol, new.base) for new in evaluation}
            kept = [old for old in manifest.evaluation if (old.protocol, old.base) not in measured]
            updated = manifest.model_copy(update={"evaluation": (*kept, *evaluation)})
            write_atomic(entry.manifest_path, updated.to_json().encode())
        return updated

    def sign(self, name: str, key: Path) -> Path:
        """Sign an eraser's file and manifest with a private key (PEM) and return the path of the signature.

        The manifest gets the date of the signature. An earlier signature is replaced.
        Raises NotFoundError, ManifestError if it has no manifest file, and the errors of `signing.sign`.
        """
        entry = self.find(name)
        if entry is None:
            raise self._missing(name)
        with storage.write_lock(self.root):
            if entry.manifest_path is None:
                raise ManifestError(f"{entry.adapter_path} has no manifest file, so it cannot be signed")
            manifest = entry.load_now().manifest
            manifest = manifest.model_copy(update={"signed": signing.next_date(manifest.signed)})
            signature = storage.part_path(self.root, storage.SIGNATURES, name)
            signed = signing.sign(entry.adapter_path, manifest, key)
            write_together({signature: signed, entry.manifest_path: manifest.to_json().encode()})
        return signature

    def remove(self, name: str) -> None:
        """Delete an eraser's files. Raises NotFoundError, or RegistryError if they cannot be deleted."""
        if self.find(name) is None:
            raise self._missing(name)
        with storage.write_lock(self.root):
            if not storage.part_path(self.root, storage.ADAPTERS, name).exists():
                raise self._missing(name)
            storage.change(self.root, {name: {}})
            lockfile.record(self.root, name, None)

    def gc(self, *, dry_run: bool = False) -> tuple[storage.Leftover, ...]:
        """Delete files that belong to no eraser (see `storage.leftovers`) and return them.

        dry_run: return them without deleting. Raises RegistryError.
        """
        if not self.root.is_dir():
            return ()
        with storage.write_lock(self.root):
            found = tuple(storage.leftovers(self.root))
            for leftover in () if dry_run else found:
                storage.delete(leftover.path)
        return found

    def _missing(self, name: str) -> NotFoundError:
        return unknown_eraser(name, [known.name for known in self.entries()], f"in {self.root}")


def check_richness(manifest: Manifest, protocol: str, base: str, samples: int, steps: int | None) -> None:
    """Refuse to replace numbers by those of fewer samples or steps. Raises RegistryError."""
    there = manifest.richer_evaluation(protocol, base, samples, steps)
    if there is not None:
        at = "" if there.steps is None else f", {counted(there.steps, 'step')}"
        now = "" if steps is None else f", {counted(steps, 'step')}"
        enough = max(there.samples, samples), max(there.steps or 0, steps or 0)
        raise RegistryError(
            f"{manifest.name} has numbers on {base} that rest on more ({counted(there.samples, 'sample')}{at}) "
            f"than these ({counted(samples, 'sample')}{now})",
            mend=f"--samples {enough[0]}{f' --steps {enough[1]}' if enough[1] else ''}, or --force",
        )


def user_registry() -> Registry:
    """Return the user's own registry, in the platform's data folder."""
    return Registry(user_folder("data"))


def requested_root(registry: Path | None = None) -> Path | None:
    """Return the registry folder that the user named: `registry`, else SPMHUB_REGISTRY if it is not empty."""
    return registry or (Path(named) if (named := os.environ.get(REGISTRY_VARIABLE)) else None)


def registries(registry: Path | None = None) -> tuple[Registry, ...]:
    """Return the registries to look names up in, in order.

    They are: `registry` or SPMHUB_REGISTRY, the user's own, and the one that an installed spm-hub brings along, which
    is only read. Before the user's own comes the working folder, but only if it is the clone of spm-hub whose code is
    running. In any other folder somebody else's erasers may answer to every name.
    Raises RegistryError if the folder that the user named does not exist.
    """
    roots = [user_registry().root]
    here = Path.cwd()
    if here == _CLONE and is_registry(here):
        roots.insert(0, here)
    if (asked := requested_root(registry)) is not None:
        if not asked.is_dir():
            raise RegistryError(
                f"the registry {asked} does not exist", mend=f"mkdir -p {quoted(asked / storage.ADAPTERS)}"
            )
        roots = [asked, *(root for root in roots if root.resolve() != asked.resolve())]
    if is_registry(_PACKAGED):
        roots.append(_PACKAGED)
    return tuple(map(Registry, roots))


def is_registry(folder: Path) -> bool:
    """Return whether a folder is laid out as a registry."""
    return (folder / storage.ADAPTERS).is_dir() and (folder / storage.MANIFESTS).is_dir()


def registry_for_new(registry: Path | None = None) -> Registry:
    """Return the registry to write new erasers to.

    It is the one that the user named, whose folder need not exist yet, else the first of `registries`.
    """
    asked = requested_root(registry)
    return Registry(asked) if asked is not None else registries()[0]


def listed_registries(registry: Path | None = None) -> tuple[Registry, ...]:
    """Return the registries to list the erasers of: only the one that the user named, or else all.

    Raises RegistryError if the folder that the user named does not exist.
    """
    known = registries(registry)
    return known if requested_root(registry) is None else known[:1]


def editable_registries(registry: Path | None = None) -> tuple[Registry, ...]:
    """Return the registries to change erasers in: the listed ones, but for the package's own.

    Raises RegistryError if the folder that the user named does not exist.
    """
    return tuple(place for place in listed_registries(registry) if place.root != _PACKAGED)


def registry_with(name: str, registry: Path | None = None) -> Registry:
    """Return the first of `editable_registries` that has an eraser of exactly that name.

    Raises NotFoundError with the nearest names.
    """
    known = editable_registries(registry)
    for place in known:
        if place.find(name) is not None:
            return place
    names = [entry.name for place in known for entry in place.entries()]
    raise unknown_eraser(name, names, "in " + ", ".join(str(place.root) for place in known))


def _new_eraser_from(adapter: "Adapter") -> _NewEraser:
    image, manifest = adapter.encode(f"{adapter.name}{_SUFFIX}")
    return _NewEraser(manifest.model_copy(update={"origin": None}), image.write_to)


def _verified_copy(source: EraserEntry, manifest: Manifest | None = None) -> _NewEraser:
    """Verify an eraser and prepare a copy of its file, manifest and signature; see `Registry.install`."""
    loaded = source.load().manifest
    if source.manifest_path is None and manifest is None:
        raise ManifestError(f"{source.adapter_path} has no manifest file to verify it against")
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
    return _NewEraser(manifest.model_copy(update={"increment": info}), copy, signature, pin)


def _same_repository(existing: EraserEntry, origin: Origin | None) -> bool:
    """Return True if the eraser's manifest and lock file both name the repository of `origin`.

    Their commits may differ: version control may have brought a newer lock file.
    """
    if origin is None:
        return False
    pin = lockfile.read(existing.adapter_path.parent.parent).get(existing.name)
    try:
        before = existing.read_manifest().origin
    except SpmHubError:
        return False
    return pin is not None and before is not None and before.repo == pin.repo == origin.repo


def _ambiguous(reference: str, found: Sequence[EraserEntry]) -> UsageError:
    return ambiguous_eraser(reference, (f"{entry.name} ({entry.adapter_path})" for entry in found))


def _called(entry: EraserEntry) -> frozenset[str]:
    """Return an eraser's name and its target, as `plain_name` spells them."""
    try:
        manifest = entry.read_manifest()
    except SpmHubError:
        return frozenset()  # an unreadable manifest must not block the others; loading it reports the error
    return frozenset(plain_name(one) for one in (manifest.name, manifest.concept.target) if one is not None)
