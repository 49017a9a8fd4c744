"""An eraser: its manifest and its increments, loaded from and saved to one safetensors file."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, reduce
from pathlib import Path
from types import MappingProxyType

import torch

from spm_hub.adapters.formats import spm
from spm_hub.adapters.formats.header import concept_in, header_metadata
from spm_hub.adapters.formats.lazy import StoredIncrements, with_dots
from spm_hub.adapters.formats.lora_config import scaling_in
from spm_hub.adapters.formats.module_names import check_roots, contradicted, family_of, flat
from spm_hub.adapters.formats.reading import read_increments
from spm_hub.adapters.increments import Increment, LowRank, check_effect
from spm_hub.adapters.manifest import Base, Concept, IncrementInfo, Manifest, slug
from spm_hub.errors import GET_AGAIN, AdapterFileError, ManifestError, UsageError
from spm_hub.io.atomic import Content, write_together
from spm_hub.io.safetensors_file import MANIFEST_KEY, Header, Image, read_header, read_tensors
from spm_hub.io.safetensors_file import encode as encode_tensors
from spm_hub.io.wording import counted, quoted

UNKNOWN_FAMILY = "unknown"
"""The family of a file whose header and tensors do not show it."""

# The keys that decide on which prompts and models an eraser acts, and how; people edit others (author, licence).
_DECISIVE = ("concept", "increment", "base", "gate")


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """One eraser: a manifest, and the increments of a denoiser's modules by their dotted path.

    Files of other programs may have . written as _ in the paths (`formats.module_names.flat`); a model's modules are
    then matched by that. source: the file that the adapter was loaded from, for messages.
    Raises ManifestError where the manifest and the increments differ in their modules, kind, rank or dtype.
    """

    manifest: Manifest
    increments: Mapping[str, Increment]
    source: str = "memory"

    def __reduce__(self) -> tuple[object, ...]:
        # For worker processes: a read-only mapping cannot be pickled, and a file may not be on their machine.
        return Adapter, (self.manifest, dict(self.increments), self.source)

    def __post_init__(self) -> None:
        if not isinstance(self.increments, StoredIncrements):
            object.__setattr__(self, "increments", MappingProxyType(dict(self.increments)))
        stated, actual = self.manifest.increment, increment_info(self.outline)
        if missing := sorted(set(stated.modules) ^ set(actual.modules)):
            where = "manifest" if missing[0] in stated.modules else "increments"
            raise ManifestError(f"{self.source}: {missing[0]} is in the {where} only ({len(missing)} such modules)")
        for key in ("kind", "rank", "dtype"):
            expected, found = getattr(stated, key), getattr(actual, key)
            if expected != found:
                raise ManifestError(
                    f"{self.source}: increment.{key} is {expected!r} in the manifest and {found!r} in the tensors"
                )

    @property
    def name(self) -> str:
        return self.manifest.name

    def __repr__(self) -> str:
        about, base = self.manifest.increment, self.manifest.base
        kind = about.kind if about.rank is None else f"{about.kind} of rank {about.rank}"
        modules = counted(len(about.modules), "module")
        of = f"{base.id} ({base.family})" if base.id else base.family
        target = self.manifest.concept.target
        erases = "an unknown concept" if target is None else repr(target)
        return f"<Adapter {self.name}: erases {erases}, {kind} on {modules}, {about.dtype}, for {of}, {self.source}>"

    @property
    def outline(self) -> Mapping[str, Increment]:
        """The increments with their kinds and shapes only: unread ones have tensors on the meta device."""
        return self.increments.outline if isinstance(self.increments, StoredIncrements) else self.increments

    def check_effect(self) -> None:
        """Raise AdapterFileError if the increments change nothing.

        Those of a lazily loaded file are checked when they are read.
        """
        if not isinstance(self.increments, StoredIncrements):
            check_effect(self.increments, f"{self.name} ({self.source})", self.manifest.concept.target or "CONCEPT")

    @cached_property
    def content(self) -> str:
        """A key that two erasers of the same increments share, whatever they are named: a hash.

        Of a lazily loaded file it is that of the whole file, empty where no manifest states it.
        """
        if isinstance(self.increments, StoredIncrements):
            return self.manifest.increment.sha256 or ""
        digest = hashlib.sha256(repr(sorted(map(flat, self.increments))).encode())
        # Two modules are enough; reading all of a dense eraser would take too long.
        for path in sorted({min(self.increments), max(self.increments)}):
            for part, tensor in sorted(self.increments[path].tensors().items()):
                numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(repr((path, part, tensor.dtype, tuple(tensor.shape))).encode())
                digest.update(numbers.numpy().tobytes())
        return digest.hexdigest()

    def with_increments(self, increments: Mapping[str, Increment]) -> "Adapter":
        """Return the eraser with other increments; its manifest describes them."""
        manifest = self.manifest.model_copy(update={"increment": increment_info(increments)})
        return Adapter(manifest, increments, self.source)

    def with_concept(self, target: str) -> "Adapter":
        """Return the eraser of another concept; its increments are the same.

        Of a name that the concept has already, the other names stay, as aliases. Raises UsageError for a blank name.
        """
        if not target.strip():
            raise UsageError("the concept is empty", mend=f'{self.name} needs a name, for instance "snoopy"')
        concept, target = self.manifest.concept, target.strip()
        others = tuple(name for name in concept.names if name != target) if target in concept.names else ()
        changed = concept.model_copy(update={"target": target, "aliases": others})
        return Adapter(self.manifest.model_copy(update={"concept": changed}), self.increments, self.source)

    def save(self, path: Path | str, manifest_path: Path | str | None = None) -> Manifest:
        """Write the adapter file and, if `manifest_path` is given, its manifest: both or neither.

        Returns the manifest with the file's name, size and sha256. Raises AdapterFileError when a tensor is not finite,
        RegistryError when the files cannot be written.
        """
        path = Path(path)
        image, written = self.encode(path.name)
        files: dict[Path, Content] = {path: image.write_to}
        if manifest_path is not None:
            files[Path(manifest_path)] = written.to_json().encode()
        write_together(files)
        return written

    def encode(self, file_name: str) -> tuple[Image, Manifest]:
        """Return the adapter file, and the manifest with the name, size and sha256 of that file.

        The adapter file depends on increments and manifest alone, and not on the clock or a path.
        Raises AdapterFileError when a tensor is not finite.
        """
        for module, increment in self.increments.items():
            for part, tensor in increment.tensors().items():
                if not torch.isfinite(tensor).all():
                    raise AdapterFileError(
                        f"{self.name}: {part} of {module} is not finite; nothing was written",
                        mend="train with a smaller learning rate",
                    )
        # From the tensors: the manifest of a lazily loaded file may have a narrower dtype (`load_file`).
        manifest = self.manifest.model_copy(update={"increment": increment_info(self.increments)})
        image = encode_tensors(spm.to_tensors(self.increments, manifest.base.family), header_metadata(manifest))
        about_file = {"file": file_name, "bytes": image.nbytes, "sha256": image.sha256}
        return image, manifest.model_copy(
            update={
                "increment": manifest.increment.model_copy(update=about_file),
                "created": manifest.created or datetime.now(UTC).replace(microsecond=0),
            }
        )


def load_file(path: Path | str, manifest_path: Path | str | None = None, *, lazy: bool = False) -> Adapter:
    """Load an adapter file; check it against the hashes in its header and against its manifest.

    manifest_path: the manifest file of the adapter, if there is one.  lazy: read only the header now, and the
    increments, with all checks of their values and hashes, when they are first needed (`formats.lazy`). A file of
    another program gets a manifest made from its header, name and tensors. Where its scales lead to a wider dtype than
    the tensors have, the manifest of a lazily loaded one has the dtype of the tensors.
    Raises AdapterFileError for a file that is truncated, altered, not finite or of an unknown layout; NotFoundError;
    ManifestError for a manifest that is not valid, describes other tensors or those of another family, or contradicts
    the one inside the file.
    """
    path = Path(path)
    sidecar = None if manifest_path is None else Manifest.read(Path(manifest_path))
    if sidecar is not None and sidecar.increment.sha256 is None:
        raise AdapterFileError(
            f"{manifest_path} cannot confirm that {path} is its file: its increment.sha256 is None", mend=GET_AGAIN
        )
    if sidecar is not None and path.is_file() and sidecar.increment.bytes not in (None, size := path.stat().st_size):
        raise AdapterFileError(
            f"{path} is not the file that {manifest_path} describes: increment.bytes is {sidecar.increment.bytes}, "
            f"the file has {size}",
            mend=GET_AGAIN,
        )
    if lazy:
        header = read_header(path)
        own = _manifest_of(path, header, sidecar)
        known = own or sidecar
        stored = StoredIncrements(
            path, header, None if sidecar is None else sidecar.increment.sha256,
            () if known is None else known.increment.modules,
        )  # fmt: skip
        manifest = own or _manifest_of_foreign(path, header, stored.outline, sidecar)
        _check_family(path, manifest, stored.outline)
        return Adapter(manifest, stored, str(path))
    header, tensors, sha256 = read_tensors(path)
    if sidecar is not None and sidecar.increment.sha256 != sha256:
        raise AdapterFileError(
            f"{path} is not the file that {manifest_path} describes: increment.sha256 is {sidecar.increment.sha256}, "
            f"the file's is {sha256}",
            mend=GET_AGAIN,
        )
    increments = read_increments(path, tensors, scaling_in(header.metadata, path))
    manifest = _manifest_of(path, header, sidecar) or _manifest_of_foreign(path, header, increments, sidecar)
    _check_family(path, manifest, increments)
    return Adapter(manifest, with_dots(increments, manifest.increment.modules), str(path))


def increment_info(increments: Mapping[str, Increment]) -> IncrementInfo:
    """Return the description of these increments for a manifest.

    Raises AdapterFileError when there are none, or increments of several kinds.
    """
    kinds = sorted({increment.kind for increment in increments.values()})
    if len(kinds) != 1:
        raise AdapterFileError(f"an adapter has increments of one kind; these are of {' and '.join(kinds) or 'none'}")
    dtype = reduce(torch.promote_types, (increment.dtype for increment in increments.values()))
    ranks = [increment.rank for increment in increments.values() if isinstance(increment, LowRank)]
    return IncrementInfo(
        kind=kinds[0],
        rank=max(ranks, default=None),
        dtype=str(dtype).removeprefix("torch."),
        modules=tuple(sorted(increments)),
    )


def manifest_difference(
    outside: Manifest, embedded: str, path: Path, keys: Iterable[str] = tuple(Manifest.model_fields)
) -> str | None:
    """Describe how the manifest embedded in the file at `path` differs from the one outside.

    Returns None if they do not differ.
    keys: those to compare; the name never counts, as a copy may be stored under another one.  embedded: the JSON text
    in the file, without the keys that are known only once the file is written. Raises ManifestError where that text is
    no manifest.
    """
    if embedded == outside.to_embedded_json():
        return None
    inside = Manifest.from_json(embedded, source=f"{path} ({MANIFEST_KEY})")
    theirs, ours = (json.loads(one.to_embedded_json()) for one in (inside, outside))
    differing = [key for key in keys if key != "name" and theirs.get(key) != ours.get(key)]
    if not differing:
        return None
    embedded_values, outside_values = (str([one[key] for key in differing])[:200] for one in (theirs, ours))
    return f"{', '.join(differing)}: {embedded_values} inside the file, {outside_values} outside it"


def _manifest_of(path: Path, header: Header, outside: Manifest | None) -> Manifest | None:
    """Return the manifest of a file with an embedded one: `outside` if there is one, or the embedded.

    Returns None for a file without an embedded manifest. Raises ManifestError where the two contradict each other.
    """
    embedded = header.metadata.get(MANIFEST_KEY)
    if embedded is None:
        return None
    if outside is None:
        # The manifest outside records where a file was pulled from; the embedded one was written before that.
        return Manifest.from_json(embedded, source=f"{path} ({MANIFEST_KEY})").model_copy(update={"origin": None})
    if difference := manifest_difference(outside, embedded, path, _DECISIVE):
        raise ManifestError(f"{path}: its manifests contradict each other in {difference}", mend=GET_AGAIN)
    return outside


def _check_family(path: Path, manifest: Manifest, increments: Mapping[str, Increment]) -> None:
    """Raise ManifestError where a manifest states one family, and the tensors are certainly of another."""
    if (found := contradicted(manifest.base.family, increments)) is not None:
        raise ManifestError(
            f"{path}: its manifest says base.family {manifest.base.family!r}, and its tensors are of {found!r}",
            mend="do not use it, and tell its author",
        )


def _manifest_of_foreign(
    path: Path, header: Header, increments: Mapping[str, Increment], outside: Manifest | None
) -> Manifest:
    """Return a manifest for a file without one; where its header names no concept, that is unknown.

    outside: a manifest file for it, which counts in all but the dtype: that is the dtype of the increments as read.
    """
    try:
        info = increment_info(increments)
    except AdapterFileError as error:
        raise AdapterFileError(f"{path}: {error.message}", mend=f"spmhub convert {quoted(path)}") from error
    if outside is not None:
        return outside.model_copy(update={"increment": outside.increment.model_copy(update={"dtype": info.dtype})})
    family = family_of(increments) or UNKNOWN_FAMILY
    check_roots(path, family, increments)
    return Manifest(
        name=slug(path.stem),
        concept=Concept.of(concept_in(header.metadata)),
        increment=info,
        base=Base(family=family, id="", fingerprint=""),
        recipe={},
        licence=header.metadata.get("modelspec.license", "unknown"),
        author=header.metadata.get("modelspec.author", ""),
    )
