"""Checks an eraser's files without a model; a failed check does not stop the ones after it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spm_hub.adapters.manifest import Manifest
from spm_hub.errors import SpmHubError
from spm_hub.io.hashing import sha256_of
from spm_hub.io.safetensors_file import MANIFEST_KEY, Header, read_header
from spm_hub.io.wording import counted
from spm_hub.registry import lockfile, signing, storage
from spm_hub.registry.entry import EraserEntry


@dataclass(frozen=True)
class Check:
    """Result of one check; `detail` is the value that was found, or the reason why it was not checked."""

    subject: str
    state: Literal["ok", "failed", "not checked"]
    detail: str


def verify(entry: EraserEntry, key: Path | None = None) -> tuple[Check, ...]:
    """Check an adapter file, its manifest and its lock file entry.

    The signature is checked too if a public `key` is given or the environment variable names one.
    """
    return tuple(_checks(entry, key or signing.required_key()))


def _checks(entry: EraserEntry, key: Path | None) -> Iterator[Check]:
    path, manifest_path = entry.adapter_path, entry.manifest_path
    header: Header | None = None
    manifest: Manifest | None = None

    def read_the_header() -> str:
        nonlocal header
        header = read_header(path)
        return f"{counted(len(header.entries), 'tensor')} covering the file from end to end"

    def read_the_manifest() -> str:
        nonlocal manifest
        manifest = entry.read_manifest()
        return f"version {manifest.schema_version}, {manifest_path}"

    yield _check("header", read_the_header)
    if manifest_path is None:
        yield Check("manifest", "not checked", "there is no manifest file, so size and sha256 are not checked either")
    else:
        yield _check("manifest", read_the_manifest)
        yield _check("size", lambda: _same("increment.bytes", _read(manifest).increment.bytes, path.stat().st_size))
        yield _check("sha256", lambda: _same("increment.sha256", _read(manifest).increment.sha256, sha256_of(path)))
    yield _check("contents", lambda: _contents(entry))
    if manifest_path is not None and header is not None and MANIFEST_KEY in header.metadata:
        embedded = header.metadata[MANIFEST_KEY]
        yield _check("manifest inside the file", lambda: _agree(_read(manifest), embedded, path))
    pin = lockfile.read(path.parent.parent).get(entry.name) if path.parent.name == storage.ADAPTERS else None
    if pin is not None:
        yield _check("pin", lambda: _same("sha256 in the lock file", pin.sha256, sha256_of(path)))
    yield _signature(entry, key)


def _check(subject: str, look: Callable[[], str]) -> Check:
    try:
        return Check(subject, "ok", look())
    except (SpmHubError, OSError) as error:
        return Check(subject, "failed", error.message if isinstance(error, SpmHubError) else str(error))


def _contents(entry: EraserEntry) -> str:
    adapter = entry.load()
    info = adapter.manifest.increment
    rank = "" if info.rank is None else f" of rank {info.rank}"
    return f"finite numbers, hashes in the header; {info.kind}{rank} for {counted(len(info.modules), 'module')}"


def _agree(manifest: Manifest, embedded: str, path: Path) -> str:
    from spm_hub.adapters.adapter import manifest_difference

    if said := manifest_difference(manifest, embedded, path):
        raise SpmHubError(said)
    return "agrees with the manifest file"


def _signature(entry: EraserEntry, key: Path | None) -> Check:
    signature = entry.signature_path
    if key is None:
        return Check("signature", "not checked", f"{signature or 'none'}; --key KEY checks it")

    def look() -> str:
        when = entry.check_signature(key).signed
        return f"made with the private key of {key}" + ("" if when is None else f" on {when:%Y-%m-%d %H:%M:%S}")

    return _check("signature", look)


def _same(what: str, said: object, found: object) -> str:
    if said != found:
        raise SpmHubError(f"{what} is {said}, but the file has {found}")
    return str(found)


def _read(manifest: Manifest | None) -> Manifest:
    if manifest is None:
        raise SpmHubError("the manifest could not be read")
    return manifest
