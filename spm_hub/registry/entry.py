"""One eraser on disk: finds its adapter file, manifest and signature, and reads them."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spm_hub.adapters.manifest import Manifest, Origin
from spm_hub.errors import GET_AGAIN, AdapterFileError, ManifestError, SignatureError, SpmHubError
from spm_hub.io.hashing import sha256_of
from spm_hub.io.wording import quoted
from spm_hub.registry import lockfile, signing, storage

if TYPE_CHECKING:
    from spm_hub.adapters.adapter import Adapter

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
"""Name of the adapter file in a repository of the Hub, the one that diffusers looks for."""
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class EraserEntry:
    """An eraser on disk that can be loaded; `manifest_path` is None for a file without a manifest file.

    origin: its repository and commit on the Hub, where its manifest does not name them.
    fetched: True if it was downloaded by this call.
    asked: the name, or the repository, that it was asked for by, where that is not `name`; a signature has to be of an
    eraser of that name.
    """

    name: str
    adapter_path: Path
    manifest_path: Path | None
    origin: Origin | None = None
    fetched: bool = False
    asked: str | None = None

    def describe_source(self) -> str:
        """Describe for a reader where the file came from and where it is kept.

        An origin that is only in the manifest, and not in a lock file, is marked as the manifest's claim.
        """
        how = "downloaded just now to" if self.fetched else "kept in"
        origin = self.origin or self.pin
        if origin is None:
            origin, how = self.read_manifest().origin, "as its manifest claims; kept in"
        if origin is None:
            return str(self.adapter_path)
        return f"{origin.repo}@{origin.commit[:12]}, {how} {self.adapter_path}"

    @property
    def pin(self) -> lockfile.Pin | None:
        """The repository and commit on the Hub that the registry pulled the eraser from.

        None unless the lock file and the manifest agree.
        """
        if self.adapter_path.parent.name != storage.ADAPTERS:
            return None
        try:
            pin = lockfile.read(self.adapter_path.parent.parent).get(self.name)
            return pin if pin is not None and pin == lockfile.pin_of(self.read_manifest()) else None
        except SpmHubError:
            return None

    def is_adapter_of(self, manifest: Manifest) -> bool:
        """Return True if the file is, byte for byte, the adapter that `manifest` describes.

        Recorded evaluations may differ.
        """
        try:
            own = self.read_manifest()
            digest = sha256_of(self.adapter_path)
        except (SpmHubError, OSError):
            return False
        same_file = digest == own.increment.sha256 == manifest.increment.sha256
        return same_file and own.to_embedded_json() == manifest.to_embedded_json()

    def read_manifest(self) -> Manifest:
        """Read the manifest, from its own file or from the adapter file's header, without reading tensors.

        A file of another program has neither; it is loaded, and a manifest is made from its contents.
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
        """Path of the eraser's signature, or None if it has none."""
        if self.adapter_path.parent.name == storage.ADAPTERS:
            path = storage.part_path(self.adapter_path.parent.parent, storage.SIGNATURES, self.adapter_path.stem)
        else:
            path = self.adapter_path.with_name(signing.SIGNATURE_NAME)
        return path if path.is_file() else None

    def load(self, *, lazy: bool = False, signed_by: Path | None = None) -> "Adapter":
        """Load the adapter and verify it against its manifest.

        lazy: read the increments only when the first one is needed.
        signed_by: public key (PEM); the adapter must be signed with its private key. Default: the key that the
        environment variable names, if any.
        While another process replaces the eraser, file and manifest are still of one version.
        """
        key = signed_by or signing.required_key()
        root = self.adapter_path.parent.parent
        if not storage.is_shared(root):
            return self.load_now(key, lazy=lazy)
        if not lazy:
            with suppress(SpmHubError):
                return self.load_now(key)
        # An error above may come from reading between another process's two renames. Under the lock an error is real.
        # A lazy load does not compute the hash that would reveal a mix of two versions, so it always takes the lock.
        with storage.write_lock(root):
            return self.load_now(key, lazy=lazy)

    def load_now(self, key: Path | None = None, *, lazy: bool = False) -> "Adapter":
        """Load the adapter without taking the lock, for a caller that has it.

        key: public key to check the signature with; None accepts an unsigned adapter.
        """
        from spm_hub.adapters.adapter import load_file

        signed = None if key is None else self.check_signature(key)
        try:
            adapter = load_file(self.adapter_path, self.manifest_path, lazy=lazy)
        except (AdapterFileError, ManifestError) as error:
            if error.mend != GET_AGAIN:
                raise
            raise type(error)(error.message, mend=self._get_again()) from error
        # The manifest contains the file's sha256, which load_file checks: one manifest means one adapter file.
        if signed is not None and adapter.manifest != signed:
            raise SignatureError(f"{self.manifest_path} was replaced while it was checked", mend="run it again")
        self._checked(adapter.manifest)
        return adapter

    def check_signature(self, key: Path) -> Manifest:
        """Check that file and manifest were signed for the public `key`, under the name asked for.

        Returns the manifest that was checked. Raises SignatureError.
        """
        signed = signing.check(self.adapter_path, self.manifest_path, self.signature_path, key)
        name = None if self.asked is None else self.asked.rpartition("/")[2]
        # Repositories of erasers are called spm-NAME as often as NAME.
        if name is not None and not any(map(signed.is_called, (name, name.removeprefix("spm-")))):
            from_hub = f"spmhub pull {self.asked} --name {signed.name}" if "/" in str(self.asked) else signed.name
            raise SignatureError(
                f"{self.asked!r} was asked for, but the signed eraser there is {signed.name!r}, of "
                f"{signed.concept.target!r}",
                mend=f"if that is the one you want: {from_hub}",
            )
        return signed

    def check_not_older(self, held: Iterable["EraserEntry"]) -> None:
        """Refuse this eraser if it was signed before one of its name among those that are `held`.

        Somebody who controls a repository, and not the key, could bring back an old version by it. It applies where a
        signature is required; an eraser that is held without a valid one counts for nothing.
        Raises SignatureError.
        """
        key = signing.required_key()
        if key is None:
            return
        manifest = self.check_signature(key)
        for one in held:
            try:
                other = one.check_signature(key)
            except SpmHubError:
                continue
            older = other.signed is not None and (manifest.signed is None or manifest.signed < other.signed)
            if other.name == manifest.name and older:
                raise SignatureError(
                    f"{manifest.name} was signed {_date(manifest)}, and {one.adapter_path} is one that was signed "
                    f"{_date(other)}: an older one does not replace it",
                    mend=f"if the older one is meant: spmhub remove {manifest.name}, or name its commit",
                )

    def _get_again(self) -> str:
        """Return what replaces a damaged file by a good one, as far as its origin is known."""
        root, pin = self.adapter_path.parent.parent, self.pin
        if pin is not None:
            of = pin.repo if pin.revision is None else f"{pin.repo}@{pin.revision}"
            return f"spmhub pull {of} --registry {quoted(root)} --force"
        if self.adapter_path.parent.name == storage.ADAPTERS:
            return f"train or convert it again with --force; or spmhub remove {quoted(self.name)}"
        return "download it again from where it came; if it is the same then, ask its author for another"

    def _checked(self, manifest: Manifest) -> Manifest:
        """Return the manifest; raise ManifestError if its name is not the file's.

        A file that was renamed by hand would be listed under one name and attached under another.
        """
        if self.manifest_path is not None and self.manifest_path.stem == self.name != manifest.name:
            raise ManifestError(
                f"{self.manifest_path}: name is {manifest.name!r}, but the file is named {self.name!r}",
                mend=f"rename it and {self.adapter_path} to {manifest.name}, or change the name inside",
            )
        return manifest


def _date(manifest: Manifest) -> str:
    return "without a date" if manifest.signed is None else f"on {manifest.signed:%Y-%m-%d %H:%M:%S}"


def entry_of(file: Path) -> EraserEntry:
    """Return the entry of an adapter file, with its manifest file if there is one.

    In a registry the manifest is manifests/NAME.json; in a folder laid out like a repository of the Hub it is
    manifest.json. A .json file next to the adapter with the same name is not read: other programs write such files.
    """
    if file.name == WEIGHTS_NAME:
        manifest = file.with_name(MANIFEST_NAME)
    else:
        manifest = storage.part_path(file.parent.parent, storage.MANIFESTS, file.stem)
    return EraserEntry(file.stem, file, manifest if manifest.is_file() else None)
