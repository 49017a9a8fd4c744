"""Export and import of erasers, as a folder laid out as a registry or as one tar file.

Archives are read by the parser below and not by tarfile: it accepts plain files only, and never takes a destination
path from the archive.
"""

import io
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Never

from spm_hub.adapters.manifest import MAX_BYTES, NAME
from spm_hub.errors import AdapterFileError, ManifestError, NotFoundError, RegistryError, UsageError
from spm_hub.io.atomic import write_atomic
from spm_hub.io.wording import quoted
from spm_hub.registry import signing, storage
from spm_hub.registry.entry import EraserEntry
from spm_hub.registry.registry import Registry

_BLOCK = 512
_OTHER_ARCHIVES = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip", ".7z")
_LARGEST = {storage.MANIFESTS: MAX_BYTES, storage.SIGNATURES: signing.MAX_BYTES, storage.ADAPTERS: storage.MAX_BYTES}
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_PART = re.compile(r"(?P<folder>[a-z]+)/(?P<name>[^/]+)(?P<suffix>\.[a-z]+)")


@dataclass(frozen=True)
class Transfer:
    """One exported or imported eraser, and whether it was new, replaced another, or was there already."""

    entry: EraserEntry
    state: Literal["new", "replaced", "unchanged"]


def export(entries: Sequence[EraserEntry], to: Path, *, replace: bool = False) -> tuple[Transfer, ...]:
    """Copy erasers into the folder `to`, or into a tar file if `to` ends with .tar: all of them or none.

    Every eraser is verified, and its error raised, before anything is written.
    Raises RegistryError if the tar file exists, or the folder has one of the names, and `replace` is False;
    UsageError for another archive format.
    """
    if any(to.name.endswith(ending) for ending in _OTHER_ARCHIVES):
        raise UsageError(
            f"{to}: erasers are exported to a folder or a plain .tar file, as compression hardly shrinks weights",
            mend=f"--out {to.name.partition('.')[0]}.tar",
        )
    entries = tuple(dict.fromkeys(entries))
    if to.suffix != ".tar":
        return _install(entries, Registry(to), replace=replace)
    if to.exists() and not replace:
        raise RegistryError(f"{to} exists already", mend="replace it with --force")
    with tempfile.TemporaryDirectory(prefix="spmhub-") as folder:
        packed = Registry(Path(folder))
        moved = _install(entries, packed, replace=False)
        write_atomic(to, lambda file: _pack(packed, file))
    return moved


def import_(source: Path, registry: Registry, *, replace: bool = False) -> tuple[Transfer, ...]:
    """Install all erasers of a folder or tar file that `export` made, or none; all are verified first.

    An origin in a manifest stays there as a claim and does not enter the lock file (see `Registry.install`).
    Raises AdapterFileError for an archive that is damaged or contains other files, RegistryError if the registry has
    another eraser of one of the names and `replace` is False, and the errors of verifying an eraser.
    """
    if source.is_dir():
        return _install(_entries_of(source, source), registry, replace=replace)
    if not source.exists():
        raise NotFoundError(f"{source}: no such file or folder")
    (registry.root / storage.STATE).mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=registry.root / storage.STATE) as folder,
        _open_archive(source) as file,
    ):
        _unpack(source, file, Path(folder))
        return _install(_entries_of(source, Path(folder)), registry, replace=replace)


def _install(entries: Iterable[EraserEntry], registry: Registry, *, replace: bool) -> tuple[Transfer, ...]:
    plan: list[tuple[EraserEntry, Literal["new", "replaced", "unchanged"]]] = []
    for entry in entries:
        manifest = entry.load().manifest
        existing = registry.find(manifest.name)
        if (
            existing is not None
            and not replace
            and existing.is_adapter_of(manifest)
            and _signature(existing) == _signature(entry)
        ):
            plan.append((entry, "unchanged"))
            continue
        registry.check_room_for(manifest.name, replace=replace)
        plan.append((entry, "new" if existing is None else "replaced"))
    changing = [entry for entry, state in plan if state != "unchanged"]
    kept = iter(registry.install_all(changing, replace=replace) if changing else ())
    return tuple(Transfer(entry if state == "unchanged" else next(kept), state) for entry, state in plan)


def _signature(entry: EraserEntry) -> bytes | None:
    return None if entry.signature_path is None else signing.read(entry.signature_path)


def _entries_of(source: Path, folder: Path) -> tuple[EraserEntry, ...]:
    """Return the erasers in `folder`; `source` is the path that errors name.

    Raises AdapterFileError if there is none or the folder contains a symbolic link, ManifestError for one without a
    manifest.
    """
    for place in (folder, *(folder / name for name in storage.SUFFIXES)):
        for path in (place, *(place.iterdir() if place.is_dir() else ())):
            if path.is_symlink() and path != folder:
                _refuse(source, f"{path.name} is a symbolic link")
    entries = Registry(folder).entries()
    if not entries:
        _refuse(source, f"it contains no eraser (no {storage.ADAPTERS}/NAME.safetensors)")
    for entry in entries:
        if entry.manifest_path is None:
            raise ManifestError(f"{source}: {entry.name} has no manifest to verify it against")
    return entries


def _pack(packed: Registry, file: BinaryIO) -> None:
    """Write the tar file. The same erasers give the same bytes: no time stamps and no owner are written."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for folder, suffix in sorted(storage.SUFFIXES.items()):
            for path in sorted((packed.root / folder).glob(f"*{suffix}")):
                member = tarfile.TarInfo(f"{folder}/{path.name}")
                member.size = path.stat().st_size
                with open(path, "rb") as content:
                    tar.addfile(member, content)


@contextmanager
def _open_archive(source: Path) -> Iterator[BinaryIO]:
    if not source.is_file():
        _refuse(source, "it is neither a folder nor a file")
    try:
        with open(source, "rb") as file:
            yield file
    except OSError as error:
        raise RegistryError(f"cannot read {source}: {error.strerror}", mend=f"chmod u+r {quoted(source)}") from error


def _unpack(source: Path, file: BinaryIO, folder: Path) -> None:
    """Copy every member of the tar file to its place in the registry layout below `folder`.

    Raises AdapterFileError at the first member that is not part of an eraser.
    """
    size = os.fstat(file.fileno()).st_size
    if file.read(2) == b"\x1f\x8b":
        _refuse(source, "it is compressed", mend=f"gunzip {quoted(source)}")
    file.seek(0)
    seen: set[str] = set()
    for name, length in _members(source, file, size):
        match = _PART.fullmatch(name)
        part = match["folder"] if match else ""
        if match is None or storage.SUFFIXES.get(part) != match["suffix"] or not re.fullmatch(NAME, match["name"]):
            _refuse(source, f"{name[:120]!r} is not part of an eraser")
        if length > _LARGEST[part]:
            _refuse(source, f"{name} has {length} bytes, more than the limit of {_LARGEST[part]}")
        if name in seen:
            _refuse(source, f"it contains {name} twice")
        seen.add(name)
        path = storage.part_path(folder, part, match["name"])
        path.parent.mkdir(exist_ok=True)
        with open(path, "xb") as copy:
            left = length
            while left:
                block = file.read(min(left, 2**20))
                if not block:
                    _refuse(source, f"it ends in the middle of {name}")
                left -= copy.write(block)
        file.seek(-length % _BLOCK, io.SEEK_CUR)


def _members(source: Path, file: BinaryIO, size: int) -> Iterator[tuple[str, int]]:
    """Yield name and length of each plain file in the tar file, with `file` positioned at its first byte.

    The caller reads the contents, and their padding to 512 bytes, before it asks for the next member. Headers are
    those of POSIX.1-1988 (ustar), which GNU tar also writes for short names.
    """
    while True:
        header = file.read(_BLOCK)
        if header == bytes(_BLOCK):
            return
        if len(header) < _BLOCK:
            _refuse(source, "it is not a tar file, or is cut short")
        try:
            name, length, checksum = _text(header[:100]), _octal(header[124:136]), _octal(header[148:156])
        except ValueError:
            _refuse(source, f"the header at byte {file.tell() - _BLOCK} is not that of a tar file")
        if checksum != sum(header[:148]) + sum(header[156:]) + 8 * ord(" "):
            _refuse(source, f"the header at byte {file.tell() - _BLOCK} is damaged")
        if header[257:263] == b"ustar\0" and header[345] != 0:
            name = f"{_text(header[345:500])}/{name}"
        kind, name = header[156:157], name.removeprefix("./")
        if kind == b"5" and length == 0:
            continue  # folders are made as files need them
        if kind not in (b"0", b"\0"):
            _refuse(source, f"{name[:120]!r} is {_KINDS.get(kind, 'of unknown type')}; only plain files are read")
        if length > size - file.tell():
            _refuse(source, f"{name[:120]!r} claims {length} bytes, but the file has only {size - file.tell()} left")
        yield name, length


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode()


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]{1,11}", digits):
        raise ValueError
    return int(digits, 8)


def _refuse(source: Path, what: str, mend: str = "make it again with: spmhub export NAME... --to FILE.tar") -> Never:
    raise AdapterFileError(f"{source}: {what}", mend=mend)
