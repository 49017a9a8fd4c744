"""One adapter where it lies: its file, the manifest and the signature that belong to it, and how they are read."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.adapters.manifest import Manifest, Origin
from spm_hub.errors import ManifestError, SignatureError, SpmHubError
from spm_hub.io.hashing import sha256_of
from spm_hub.registry import lockfile, signing, storage

if TYPE_CHECKING:
    from spm_hub.adapters.adapter import Adapter

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
"""The adapter in a repository of the Hub, as diffusers looks for it; its manifest stands beside it."""
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """One adapter that can be loaded; `manifest_path` is None for a file that came alone.

    `origin` is where on the Hub it is from, when that is not in its manifest; `fetched`: it was downloaded just now.
    """

    name: str
    adapter_path: Path
    manifest_path: Path | None
    origin: Origin | None = None
    fetched: bool = False

    def whence(self) -> str:
        """Where the file is from and where it lies, for a person; what nobody here has pulled only claims to be."""
        how = "downloaded just now to" if self.fetched else "kept in"
        origin = self.origin or self.pin
        if origin is None:
            origin, how = self.read_manifest().origin, "as its manifest claims; kept in"
        if origin is None:
            return str(self.adapter_path)
        return f"{origin.repo}@{origin.commit[:12]}, {how} {self.adapter_path}"

    @property
    def pin(self) -> lockfile.Pin | None:
        """The commit of the Hub that its registry pulled it from; None unless lock file and manifest both say so."""
        if self.adapter_path.parent.name != storage.ADAPTERS:
            return None
        try:
            pin = lockfile.read(self.adapter_path.parent.parent).get(self.name)
            return pin if pin is not None and pin == lockfile.pin_of(self.read_manifest()) else None
        except SpmHubError:
            return None

    def holds(self, manifest: Manifest) -> bool:
        """Whether this is, to the last byte of its file, the adapter of that manifest; numbers measured may differ."""
        try:
            mine = self.read_manifest()
            digest = sha256_of(self.adapter_path)
        except (SpmHubError, OSError):
            return False
        known = digest == mine.increment.sha256 == manifest.increment.sha256
        return known and mine.to_embedded_json() == manifest.to_embedded_json()

    def read_manifest(self) -> Manifest:
        """The manifest, from beside the file or from inside it, without reading tensors.

        Only a file of another program, which has neither, is loaded to be described.
        """
        from spm_hub.io.safetensors_file import MANIFEST_KEY, read_header

        if self.manifest_path is not None:
            return self._checked(Manifest.read(self.manifest_path))
        embedded = read_header(self.adapter_path).metadata.get(MANIFEST_KEY)
        if embedded is not None:
            inside = Manifest.from_json(embedded, source=self.adapter_path)
            return inside.model_copy(update={"origin": None})  # as load_file does
        return self.load().manifest

    @property
    def signature_path(self) -> Path | None:
        """The signature that stands where that of this file belongs, if one does."""
        if self.adapter_path.parent.name == storage.ADAPTERS:
            beside = storage.place(self.adapter_path.parent.parent, storage.SIGNATURES, self.adapter_path.stem)
        else:
            beside = self.adapter_path.with_name(signing.SIGNATURE_NAME)
        return beside if beside.is_file() else None

    def load(self, *, lazy: bool = False, signed_by: Path | None = None) -> "Adapter":
        """The adapter itself, verified against its manifest; when `lazy`, its increments as soon as one is needed.

        signed_by: a public key whose holder has to have signed it; unless given, the one that the environment requires.
        Never a file and a manifest of two versions, whoever replaces them meanwhile.
        """
        key = signed_by or signing.required_key()
        root = self.adapter_path.parent.parent
        if not storage.is_shared(root):
            return self.load_now(key, lazy=lazy)
        if not lazy:
            with suppress(SpmHubError):
                return self.load_now(key)
        # What is wrong may have been read between two renames; what is wrong while nobody writes, is. And a lazy
        # reader, who does not read as far as the hash that would tell him, has to wait for the writers every time.
        with storage.writing(root):
            return self.load_now(key, lazy=lazy)

    def load_now(self, key: Path | None = None, *, lazy: bool = False) -> "Adapter":
        """As `load` does, for the registry's one writer; unless `key` is given, signed or not."""
        from spm_hub.adapters.adapter import load_file

        signed = None
        if key is not None:
            signed = signing.check(self.adapter_path, self.manifest_path, self.signature_path, key)
        adapter = load_file(self.adapter_path, self.manifest_path, lazy=lazy)
        # The manifest names the sha256 of the file, which is checked when it is read: one manifest, one adapter.
        if signed is not None and adapter.manifest != signed:
            raise SignatureError(f"{self.manifest_path} was replaced while it was checked", mend="run it again")
        self._checked(adapter.manifest)
        return adapter

    def _checked(self, manifest: Manifest) -> Manifest:
        """Files renamed by hand would be listed under one name and gated under another."""
        if self.manifest_path is not None and self.manifest_path.stem == self.name != manifest.name:
            raise ManifestError(
                f"{self.manifest_path}: name is {manifest.name!r}, the file's is {self.name!r}",
                mend=f"rename it and {self.adapter_path} to {manifest.name}, or change the name inside",
            )
        return manifest


def entry_of(file: Path) -> Entry:
    """The entry of an adapter file, with the manifest that its place says is its own.

    A .json of the same name in the same folder is not one: other programs keep their own notes there.
    """
    if file.name == WEIGHTS_NAME:
        beside = file.with_name(MANIFEST_NAME)
    else:
        beside = storage.place(file.parent.parent, storage.MANIFESTS, file.stem)
    return Entry(file.stem, file, beside if beside.is_file() else None)
